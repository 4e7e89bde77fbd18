// One lane, plain C++: what every other vector type must agree with in every bit. Included inside a namespace.

struct V {
  using F = float;
  using I = std::uint32_t;
  static constexpr int N = 1;

  static std::uint32_t bits(F x) {
    std::uint32_t u;
    __builtin_memcpy(&u, &x, sizeof u);
    return u;
  }
  static F from_bits(std::uint32_t u) {
    F x;
    __builtin_memcpy(&x, &u, sizeof x);
    return x;
  }
  static bool is_nan(std::uint32_t u) { return (u & 0x7fffffffu) > 0x7f800000u; }

  static F set1(float x) { return x; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F sqrt(F a) { return __builtin_sqrtf(a); }
  static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }    // a * b + c
  static F fms(F a, F b, F c) { return __builtin_fmaf(a, b, -c); }   // a * b - c
  static F fnma(F a, F b, F c) { return __builtin_fmaf(-a, b, c); }  // c - a * b

  static F load_f32(const float* p) { return *p; }
  static void store_f32(float* p, F x) { *p = x; }

  static F load_bf16(const std::uint16_t* p) { return from_bits(std::uint32_t(*p) << 16); }
  static F store_bf16(std::uint16_t* p, F x) {
    const std::uint32_t u = bits(x);
    *p = std::uint16_t(is_nan(u) ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    return load_bf16(p);
  }

  static F load_f16(const std::uint16_t* p) {
    const std::uint32_t sign = std::uint32_t(*p & 0x8000u) << 16;
    const std::uint32_t rest = *p & 0x7fffu;
    if (rest < 0x0400u) return from_bits(sign | bits(float(rest) * 0x1p-24f));
    // Infinities and NaN keep an exponent of all ones; a signalling NaN is made quiet, as F16C does.
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest > 0x7c00u ? 0x400000u : 0u) | (rest & 0x3ffu) << 13);
    return from_bits(sign | ((rest << 13) + (112u << 23)));
  }
  static F store_f16(std::uint16_t* p, F x) {
    const std::uint32_t sign = (bits(x) >> 16) & 0x8000u;
    const std::uint32_t mag = bits(x) & 0x7fffffffu;
    std::uint32_t h;
    if (mag > 0x7f800000u) {
      h = 0x7e00u | ((mag >> 13) & 0x3ffu);
    } else if (mag >= 0x477ff000u) {  // 65520 and above round to infinity
      h = 0x7c00u;
    } else if (mag < 0x38800000u) {  // below 2^-14: 0.5 has the spacing of fp16's denormals, so the sum rounds for us
      h = bits(from_bits(mag) + 0.5f) - 0x3f000000u;
    } else {
      h = (mag + 0xfffu + ((mag >> 13) & 1u) - (112u << 23)) >> 13;
    }
    *p = std::uint16_t(sign | h);
    return load_f16(p);
  }

  static F join(const std::uint16_t* p, const std::int16_t* r) {
    return from_bits((std::uint32_t(*p) << 16) + std::uint32_t(std::int32_t(*r)));
  }
  static void split(std::uint16_t* p, std::int16_t* r, F x) {
    const std::uint32_t u = is_nan(bits(x)) ? 0x7fc00000u : bits(x);
    *p = std::uint16_t((u + 0x8000u) >> 16);
    *r = std::int16_t(std::uint16_t(u));
  }

  // The bits of x; of a NaN, those of the one quiet NaN.
  static I rounding_bits(F x) { return is_nan(bits(x)) ? 0x7fc00000u : bits(x); }
  static F join24(const std::uint16_t* p, const std::uint8_t* c) {
    return from_bits((std::uint32_t(*p) << 16) + (std::uint32_t(std::int32_t(std::int8_t(*c))) << 8));
  }
  // `step` with x's sign; x itself where it is zero or NaN.
  static F toward(F step, F x) {
    return x > 0.0f || x < 0.0f ? from_bits((bits(x) & 0x80000000u) | bits(step)) : x;
  }

  static I iset(std::uint32_t x) { return x; }
  static I as_i(F x) { return bits(x); }
  static F as_f(I x) { return from_bits(x); }
  static I iadd(I a, I b) { return a + b; }
  static I isub(I a, I b) { return a - b; }
  static I imul(I a, I b) { return a * b; }
  static I iand(I a, I b) { return a & b; }
  static I ior(I a, I b) { return a | b; }
  static I ixor(I a, I b) { return a ^ b; }
  static I imin(I a, I b) { return a < b ? a : b; }
  static I imax(I a, I b) { return a > b ? a : b; }
  template <int K>
  static I shl(I a) { return a << K; }
  template <int K>
  static I shr(I a) { return a >> K; }
  static I lane_steps() { return 0; }  // i * 0x9e3779b9 in lane i
  static std::uint32_t largest(I a) { return a; }
  static I load_signed_bytes(const std::uint8_t* p) { return std::uint32_t(std::int32_t(std::int8_t(*p))); }
  static I load_bytes(const std::uint8_t* p) { return *p; }
  // Four vectors at a time: halves below 2^16; bytes of x - BASE, from LEAST to 255, with the signs of `sign` on top.
  static void store_halves(std::uint16_t* p, const I (&x)[4]) {
    for (int k = 0; k < 4; ++k) p[k] = std::uint16_t(x[k]);
  }
  template <int BASE, int LEAST>
  static void store_bytes(std::uint8_t* p, const I (&x)[4]) {
    for (int k = 0; k < 4; ++k) p[k] = std::uint8_t(imax(x[k] - BASE, LEAST));
  }
  template <int BASE>
  static void store_signed_bytes(std::uint8_t* p, const I (&x)[4], const F* sign) {
    for (int k = 0; k < 4; ++k) p[k] = std::uint8_t((x[k] - BASE) | (bits(sign[k]) >> 31) << 7);
  }

  struct Sum {
    double lane = 0.0;
    void add_square(F x) { lane += double(x) * double(x); }  // the product of two floats is exact in double
    void store(double* out) const { *out = lane; }
  };
};
