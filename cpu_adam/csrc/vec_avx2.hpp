// Eight lanes: AVX2, FMA, F16C. Included inside a namespace.

struct V {
  using F = __m256;
  static constexpr int N = 8;

  static F set1(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }

  static F load_f32(const float* p) { return _mm256_loadu_ps(p); }
  static void store_f32(float* p, F x) { _mm256_storeu_ps(p, x); }

  static __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static void store16(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
  // The low halves of eight 32-bit lanes, whose upper halves must be zero.
  static __m128i narrow(__m256i x) {
    return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  }
  static __m256i quiet(F x, std::int32_t nan) {
    const F unordered = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_castps_si256(_mm256_blendv_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(nan)), unordered));
  }

  static F load_bf16(const std::uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16));
  }
  static F store_bf16(std::uint16_t* p, F x) {
    const __m256i u = quiet(x, 0x7fc00000);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i half = _mm256_srli_epi32(sum, 16);
    store16(p, narrow(half));
    return _mm256_castsi256_ps(_mm256_slli_epi32(half, 16));
  }

  static F load_f16(const std::uint16_t* p) { return _mm256_cvtph_ps(load16(p)); }
  static F store_f16(std::uint16_t* p, F x) {
    const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store16(p, half);
    return _mm256_cvtph_ps(half);
  }

  static F join(const std::uint16_t* p, const std::int16_t* r) {
    const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16);
    return _mm256_castsi256_ps(_mm256_add_epi32(high, _mm256_cvtepi16_epi32(load16(r))));
  }
  static void split(std::uint16_t* p, std::int16_t* r, F x) {
    const __m256i u = quiet(x, 0x7fc00000);
    store16(p, narrow(_mm256_srli_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x8000)), 16)));
    store16(r, narrow(_mm256_and_si256(u, _mm256_set1_epi32(0xffff))));
  }

  struct Sum {
    __m256d low = _mm256_setzero_pd();
    __m256d high = _mm256_setzero_pd();
    void add_square(F x) {
      const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
      const __m256d b = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
      low = _mm256_fmadd_pd(a, a, low);
      high = _mm256_fmadd_pd(b, b, high);
    }
    void store(double* out) const {
      _mm256_storeu_pd(out, low);
      _mm256_storeu_pd(out + 4, high);
    }
  };
};
