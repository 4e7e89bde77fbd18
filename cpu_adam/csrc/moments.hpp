// How moments are kept in fewer bits. Included inside a namespace, after `V`.
//
// [Note: noise] What is rounded by chance takes its chance from (seed, step, index of the element) alone: never from
// threads, pieces or the width of a vector. A group's key is splitmix64 of those, its upper half; element i of the
// group mixes key + i * 0x9e3779b9 into 32 bits. Of these the low 8 round the weight; for bf16 moments the low 16 round
// exp_avg and the upper 16 exp_avg_sq, for 8-bit ones the low and the upper 18 do. Where two of them share bits these are
// the most significant of one alone.
//
// [Note: codes] An 8-bit moment is logarithmic far from zero and linear near it. With y the magnitude over the group's
// scale, the bits of y + 1 beyond those of 1.0, shortened to kCodeBits of mantissa, are the code: integer work alone, zero
// stays zero, and rounding by chance in the bits is unbiased in y. exp_avg keeps its sign in the top bit; exp_avg_sq
// keeps its square root, and no code 0: a root that is lost beside its group's largest one is taken for the smallest
// there is, so that such an element moves too little rather than far too much. The largest of the group has the top
// code. A scale is that of one unit of y; it is 0, and so are the codes, where the group's largest is below 2^-96, and
// NaN, the codes 0, where the group has an infinity or a NaN: then all of the group is NaN from the next step on.

template <int M>
struct MomentElem {
  using T = std::uint8_t;
};
template <>
struct MomentElem<kMomentsF32> {
  using T = float;
};
template <>
struct MomentElem<kMomentsBF16> {
  using T = std::uint16_t;
};

constexpr std::uint32_t kOneBits = 0x3f800000u;
constexpr std::uint32_t kInfinityBits = 0x7f800000u;

inline std::uint32_t group_key(std::uint64_t key, std::uint64_t group) {
  std::uint64_t z = key + (group + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return std::uint32_t((z ^ (z >> 31)) >> 32);
}

// For the lanes that begin with element `first` of the group. One round of mixing does: the key is mixed well already.
inline V::I noise(std::uint32_t key, std::uint32_t first) {
  V::I x = V::iadd(V::lane_steps(), V::iset(key + first * 0x9e3779b9u));
  x = V::imul(V::ixor(x, V::template shr<15>(x)), V::iset(0x846ca68bu));
  return V::ixor(x, V::template shr<16>(x));
}

constexpr int kCodeBits = 5;             // of mantissa
constexpr int kCut = 23 - kCodeBits;     // bits that are cut off
constexpr int kCodeOfZero = kOneBits >> kCut;

inline V::F magnitude(V::F x) { return V::as_f(V::iand(V::as_i(x), V::iset(0x7fffffffu))); }

// The code plus kCodeOfZero; `chance` is kCut random bits.
inline V::I encode(V::F magnitude, V::F inverse, V::I chance) {
  return V::template shr<kCut>(V::iadd(V::as_i(V::fma(magnitude, inverse, V::set1(1.0f))), chance));
}

// kTop, y of a group's largest, stays so far below the last code's that neither rounding nor chance can pass it.
struct ExpAvgCode {
  static constexpr float kTop = 14.7499f;  // the code 127 is 14.75
  static V::F decode(const std::uint8_t* code, V::F scale) {
    const V::I bits = V::template shl<kCut>(V::load_signed_bytes(code));
    const V::I z = V::iadd(V::iand(bits, V::iset(0x7fu << kCut)), V::iset(kOneBits));
    // z - 1 is exact, so this rounds once, as (z - 1) * scale does.
    const V::F m = V::fms(V::as_f(z), scale, scale);
    return V::as_f(V::ixor(V::as_i(m), V::iand(bits, V::iset(0x80000000u))));
  }
  static void store(std::uint8_t* to, const V::F* m, const V::I* random, V::F inverse) {
    V::I code[4];
    for (int k = 0; k < 4; ++k)
      code[k] = encode(magnitude(m[k]), inverse, V::iand(random[k], V::iset((1u << kCut) - 1)));
    V::template store_signed_bytes<kCodeOfZero>(to, code, m);
  }
};

struct ExpAvgSqCode {
  static constexpr float kTop = 250.998f;  // the code 255 is 251
  static V::F decode(const std::uint8_t* code, V::F scale) {
    const V::I z = V::iadd(V::template shl<kCut>(V::load_bytes(code)), V::iset(kOneBits));
    const V::F root = V::fms(V::as_f(z), scale, scale);
    return V::mul(root, root);
  }
  static void store(std::uint8_t* to, const V::F* root, const V::I* random, V::F inverse) {
    V::I code[4];
    for (int k = 0; k < 4; ++k) code[k] = encode(root[k], inverse, V::template shr<32 - kCut>(random[k]));
    V::template store_bytes<kCodeOfZero, 1>(to, code);
  }
};

// What a group's largest magnitude, as bits, makes of it; `inverse` is 0 where there is nothing to encode.
struct GroupScale {
  float scale, inverse;
  GroupScale(std::uint32_t largest, float top) : scale(0.0f), inverse(0.0f) {
    float x;
    __builtin_memcpy(&x, &largest, sizeof x);
    if (largest >= kInfinityBits) {
      scale = __builtin_nanf("");
    } else if (x >= 0x1p-96f) {
      scale = x / top;
      inverse = top / x;
    }
  }
};
