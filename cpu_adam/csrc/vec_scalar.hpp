// One lane, plain C++: what every other vector type must agree with in every bit. Included inside a namespace.

struct V {
  using F = float;
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

  struct Sum {
    double lane = 0.0;
    void add_square(F x) { lane += double(x) * double(x); }  // the product of two floats is exact in double
    void store(double* out) const { *out = lane; }
  };
};
