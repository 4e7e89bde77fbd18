// Eight lanes: AVX2, FMA, F16C. Included inside a namespace.

struct V {
  using F = __m256;
  using I = __m256i;
  static constexpr int N = 8;

  static F set1(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
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

  static I rounding_bits(F x) { return quiet(x, 0x7fc00000); }
  static F join24(const std::uint16_t* p, const std::uint8_t* c) {
    const I low = _mm256_slli_epi32(_mm256_cvtepi8_epi32(load8(c)), 8);
    return as_f(iadd(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16), low));
  }
  static F toward(F step, F x) {
    const F sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0f));
    return _mm256_blendv_ps(x, _mm256_or_ps(sign, step), _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_OQ));
  }

  static __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
  static I iset(std::uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static I as_i(F x) { return _mm256_castps_si256(x); }
  static F as_f(I x) { return _mm256_castsi256_ps(x); }
  static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
  static I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I imul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I iand(I a, I b) { return _mm256_and_si256(a, b); }
  static I ior(I a, I b) { return _mm256_or_si256(a, b); }
  static I ixor(I a, I b) { return _mm256_xor_si256(a, b); }
  static I imin(I a, I b) { return _mm256_min_epu32(a, b); }
  static I imax(I a, I b) { return _mm256_max_epu32(a, b); }
  template <int K>
  static I shl(I a) { return _mm256_slli_epi32(a, K); }
  template <int K>
  static I shr(I a) { return _mm256_srli_epi32(a, K); }
  static I lane_steps() {
    return imul(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), iset(0x9e3779b9u));
  }
  static std::uint32_t largest(I a) {
    __m128i x = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0x4e));
    x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0xb1));
    return static_cast<std::uint32_t>(_mm_cvtsi128_si32(x));
  }
  static I load_signed_bytes(const std::uint8_t* p) { return _mm256_cvtepi8_epi32(load8(p)); }
  static I load_bytes(const std::uint8_t* p) { return _mm256_cvtepu8_epi32(load8(p)); }
  static void store32(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static void store_halves(std::uint16_t* p, const I (&x)[4]) {
    store32(p, _mm256_permute4x64_epi64(_mm256_packus_epi32(x[0], x[1]), 0xd8));
    store32(p + 16, _mm256_permute4x64_epi64(_mm256_packus_epi32(x[2], x[3]), 0xd8));
  }
  template <int BASE>
  static I pack_bytes(const I (&x)[4]) {  // packing works on halves of a vector: in_order() puts them right
    const I base = _mm256_set1_epi16(BASE);
    return _mm256_packus_epi16(_mm256_sub_epi16(_mm256_packus_epi32(x[0], x[1]), base),
                               _mm256_sub_epi16(_mm256_packus_epi32(x[2], x[3]), base));
  }
  static I in_order(I x) { return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }
  template <int BASE, int LEAST>
  static void store_bytes(std::uint8_t* p, const I (&x)[4]) {
    I bytes = pack_bytes<BASE>(x);
    if (LEAST > 0) bytes = _mm256_max_epu8(bytes, _mm256_set1_epi8(LEAST));
    store32(p, in_order(bytes));
  }
  template <int BASE>
  static void store_signed_bytes(std::uint8_t* p, const I (&x)[4], const F* sign) {
    // Saturation makes of a float's bits the largest or the smallest integer, as its sign says.
    const I signs = _mm256_packs_epi16(_mm256_packs_epi32(as_i(sign[0]), as_i(sign[1])),
                                       _mm256_packs_epi32(as_i(sign[2]), as_i(sign[3])));
    store32(p, in_order(ior(pack_bytes<BASE>(x), iand(signs, iset(0x80808080u)))));
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
