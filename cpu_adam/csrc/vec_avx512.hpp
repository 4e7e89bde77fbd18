// Sixteen lanes: AVX-512 F, BW, DQ, VL. Included inside a namespace.

struct V {
  using F = __m512;
  static constexpr int N = 16;

  static F set1(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }

  static F load_f32(const float* p) { return _mm512_loadu_ps(p); }
  static void store_f32(float* p, F x) { _mm512_storeu_ps(p, x); }

  static __m256i load16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store16(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static __m512i quiet(F x, std::int32_t nan) {
    const __mmask16 unordered = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_blend_epi32(unordered, _mm512_castps_si512(x), _mm512_set1_epi32(nan));
  }

  static F load_bf16(const std::uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(p)), 16));
  }
  static F store_bf16(std::uint16_t* p, F x) {
    // Not VCVTNEPS2BF16: it takes denormals for zero.
    const __m512i u = quiet(x, 0x7fc00000);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i half = _mm512_srli_epi32(sum, 16);
    store16(p, _mm512_cvtepi32_epi16(half));
    return _mm512_castsi512_ps(_mm512_slli_epi32(half, 16));
  }

  static F load_f16(const std::uint16_t* p) { return _mm512_cvtph_ps(load16(p)); }
  static F store_f16(std::uint16_t* p, F x) {
    const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store16(p, half);
    return _mm512_cvtph_ps(half);
  }

  static F join(const std::uint16_t* p, const std::int16_t* r) {
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(p)), 16);
    return _mm512_castsi512_ps(_mm512_add_epi32(high, _mm512_cvtepi16_epi32(load16(r))));
  }
  static void split(std::uint16_t* p, std::int16_t* r, F x) {
    const __m512i u = quiet(x, 0x7fc00000);
    store16(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x8000)), 16)));
    store16(r, _mm512_cvtepi32_epi16(u));
  }

  struct Sum {
    __m512d low = _mm512_setzero_pd();
    __m512d high = _mm512_setzero_pd();
    void add_square(F x) {
      const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
      const __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
      low = _mm512_fmadd_pd(a, a, low);
      high = _mm512_fmadd_pd(b, b, high);
    }
    void store(double* out) const {
      _mm512_storeu_pd(out, low);
      _mm512_storeu_pd(out + 8, high);
    }
  };
};
