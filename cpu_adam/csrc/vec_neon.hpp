// Four lanes: the NEON that every aarch64 has. Included inside a namespace.

struct V {
  using F = float32x4_t;
  using I = uint32x4_t;
  static constexpr int N = 4;

  static F set1(float x) { return vdupq_n_f32(x); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F sqrt(F a) { return vsqrtq_f32(a); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F fms(F a, F b, F c) { return vfmaq_f32(vnegq_f32(c), a, b); }
  static F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }

  static F load_f32(const float* p) { return vld1q_f32(p); }
  static void store_f32(float* p, F x) { vst1q_f32(p, x); }

  static I quiet(F x) { return vbslq_u32(vceqq_f32(x, x), as_i(x), iset(0x7fc00000u)); }

  static F load_bf16(const std::uint16_t* p) { return as_f(vshll_n_u16(vld1_u16(p), 16)); }
  static F store_bf16(std::uint16_t* p, F x) {
    const I u = quiet(x);
    const I sum = iadd(u, iadd(iand(shr<16>(u), iset(1)), iset(0x7fff)));
    vst1_u16(p, vshrn_n_u32(sum, 16));
    return as_f(iand(sum, iset(0xffff0000u)));
  }

  static F load_f16(const std::uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static F store_f16(std::uint16_t* p, F x) {
    const float16x4_t half = vcvt_f16_f32(x);
    vst1_u16(p, vreinterpret_u16_f16(half));
    return vcvt_f32_f16(half);
  }

  static F join(const std::uint16_t* p, const std::int16_t* r) {
    return as_f(iadd(vshll_n_u16(vld1_u16(p), 16), vreinterpretq_u32_s32(vmovl_s16(vld1_s16(r)))));
  }
  static void split(std::uint16_t* p, std::int16_t* r, F x) {
    const I u = quiet(x);
    vst1_u16(p, vshrn_n_u32(iadd(u, iset(0x8000u)), 16));
    vst1_s16(r, vreinterpret_s16_u16(vmovn_u32(u)));
  }

  static I rounding_bits(F x) { return quiet(x); }
  static F join24(const std::uint16_t* p, const std::uint8_t* c) {
    return as_f(iadd(vshll_n_u16(vld1_u16(p), 16), shl<8>(load_signed_bytes(c))));
  }
  static F toward(F step, F x) {
    const I signed_step = ior(iand(as_i(x), iset(0x80000000u)), as_i(step));
    return as_f(vbslq_u32(vcagtq_f32(x, set1(0.0f)), signed_step, as_i(x)));
  }

  static uint8x8_t load4(const std::uint8_t* p) {
    std::uint32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return vreinterpret_u8_u32(vdup_n_u32(four));
  }
  static I iset(std::uint32_t x) { return vdupq_n_u32(x); }
  static I as_i(F x) { return vreinterpretq_u32_f32(x); }
  static F as_f(I x) { return vreinterpretq_f32_u32(x); }
  static I iadd(I a, I b) { return vaddq_u32(a, b); }
  static I isub(I a, I b) { return vsubq_u32(a, b); }
  static I imul(I a, I b) { return vmulq_u32(a, b); }
  static I iand(I a, I b) { return vandq_u32(a, b); }
  static I ior(I a, I b) { return vorrq_u32(a, b); }
  static I ixor(I a, I b) { return veorq_u32(a, b); }
  static I imin(I a, I b) { return vminq_u32(a, b); }
  static I imax(I a, I b) { return vmaxq_u32(a, b); }
  template <int K>
  static I shl(I a) {
    return vshlq_n_u32(a, K);
  }
  template <int K>
  static I shr(I a) {
    return vshrq_n_u32(a, K);
  }
  static I lane_steps() {
    const std::uint32_t index[4] = {0, 1, 2, 3};
    return imul(vld1q_u32(index), iset(0x9e3779b9u));
  }
  static std::uint32_t largest(I a) { return vmaxvq_u32(a); }
  static I load_signed_bytes(const std::uint8_t* p) {
    return vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load4(p))))));
  }
  static I load_bytes(const std::uint8_t* p) { return vmovl_u16(vget_low_u16(vmovl_u8(load4(p)))); }
  static void store_halves(std::uint16_t* p, const I (&x)[4]) {
    for (int k = 0; k < 4; ++k) vst1_u16(p + 4 * k, vmovn_u32(x[k]));
  }
  template <int BASE>
  static uint8x16_t pack_bytes(const I (&x)[4]) {
    const uint16x8_t base = vdupq_n_u16(BASE);
    const uint16x8_t low = vsubq_u16(vcombine_u16(vmovn_u32(x[0]), vmovn_u32(x[1])), base);
    const uint16x8_t high = vsubq_u16(vcombine_u16(vmovn_u32(x[2]), vmovn_u32(x[3])), base);
    return vcombine_u8(vmovn_u16(low), vmovn_u16(high));
  }
  template <int BASE, int LEAST>
  static void store_bytes(std::uint8_t* p, const I (&x)[4]) {
    vst1q_u8(p, vmaxq_u8(pack_bytes<BASE>(x), vdupq_n_u8(LEAST)));
  }
  template <int BASE>
  static void store_signed_bytes(std::uint8_t* p, const I (&x)[4], const F* sign) {
    const I signs[4] = {shr<24>(as_i(sign[0])), shr<24>(as_i(sign[1])), shr<24>(as_i(sign[2])), shr<24>(as_i(sign[3]))};
    vst1q_u8(p, vorrq_u8(pack_bytes<BASE>(x), vandq_u8(pack_bytes<0>(signs), vdupq_n_u8(0x80))));
  }

  struct Sum {
    float64x2_t low = vdupq_n_f64(0.0);
    float64x2_t high = vdupq_n_f64(0.0);
    void add_square(F x) {
      const float64x2_t a = vcvt_f64_f32(vget_low_f32(x));
      const float64x2_t b = vcvt_high_f64_f32(x);
      low = vfmaq_f64(low, a, a);
      high = vfmaq_f64(high, b, b);
    }
    void store(double* out) const {
      vst1q_f64(out, low);
      vst1q_f64(out + 2, high);
    }
  };
};
