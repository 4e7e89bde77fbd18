// How moments are kept in fewer bits. Included inside a namespace, after `V`.
//
// [Note: noise] What is rounded by chance takes its chance from (seed, step, index of the element) alone: never from
// threads, pieces or the width of a vector. A group's key is splitmix64 of those, its upper half; element i of the
// group mixes key + i * 0x9e3779b9 into 32 bits. Of these the low 8 round the weight, the next 8 an 8-bit exp_avg, the
// upper 16 exp_avg_sq; of bf16 moments the low 16 round exp_avg.
//
// [Note: codes] An 8-bit moment is logarithmic far from zero and linear near it. With y the magnitude over the group's
// scale, the bits of y + 1 beyond those of 1.0, shortened to kBits of mantissa, are the code: integer work alone, zero
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

// For the lanes that begin with element `first` of the group.
inline V::I noise(std::uint32_t key, std::uint32_t first) {
  V::I x = V::iadd(V::lane_steps(), V::iset(key + first * 0x9e3779b9u));
  x = V::imul(V::ixor(x, V::template shr<16>(x)), V::iset(0x7feb352du));
  x = V::imul(V::ixor(x, V::template shr<15>(x)), V::iset(0x846ca68bu));
  return V::ixor(x, V::template shr<16>(x));
}

struct ExpAvgCode {
  static constexpr int kBits = 5;         // of mantissa
  static constexpr float kTop = 14.75f;   // y of the code 127
  static V::F decode(V::I code, V::F scale) {
    const V::I z = V::iand(V::template shl<23 - kBits>(code), V::iset(0x7fu << (23 - kBits)));
    const V::F y = V::sub(V::as_f(V::iadd(z, V::iset(kOneBits))), V::set1(1.0f));
    const V::I sign = V::iand(V::template shl<24>(code), V::iset(0x80000000u));
    return V::as_f(V::ixor(V::as_i(V::mul(y, scale)), sign));
  }
  static V::I magnitude(V::F m) { return V::iand(V::as_i(m), V::iset(0x7fffffffu)); }
  static V::I encode(V::F m, V::F inverse, V::I random) {
    const V::F y = V::mul(V::as_f(magnitude(m)), inverse);
    const V::I z = V::isub(V::as_i(V::add(y, V::set1(1.0f))), V::iset(kOneBits));
    const V::I code = V::imin(V::template shr<23 - kBits>(V::iadd(z, chance(random))), V::iset(127));
    return V::ior(code, V::iand(V::template shr<24>(V::as_i(m)), V::iset(0x80)));
  }
  // Bits 8 to 15 as the highest of the bits that are cut off.
  static V::I chance(V::I random) { return V::template shl<23 - kBits - 16>(V::iand(random, V::iset(0xff00u))); }
};

struct ExpAvgSqCode {
  static constexpr int kBits = 5;
  static constexpr float kTop = 251.0f;  // y of the code 255
  static V::F decode(V::I code, V::F scale) {
    const V::F z = V::as_f(V::iadd(V::template shl<23 - kBits>(code), V::iset(kOneBits)));
    const V::F root = V::mul(V::sub(z, V::set1(1.0f)), scale);
    return V::mul(root, root);
  }
  // May exceed 255, at which storing it stops.
  static V::I encode(V::F root, V::F inverse, V::I random) {
    const V::F y = V::mul(root, inverse);
    const V::I z = V::isub(V::as_i(V::add(y, V::set1(1.0f))), V::iset(kOneBits));
    const V::I chance = V::template shl<23 - kBits - 16>(V::template shr<16>(random));
    return V::imax(V::template shr<23 - kBits>(V::iadd(z, chance)), V::iset(1));
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
