// Sixteen lanes: AVX-512 F, BW, DQ, VL. Included inside a namespace.

struct V {
  using F = __m512;
  using I = __m512i;
  static constexpr int N = 16;

  static F set1(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
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

  static I rounding_bits(F x) { return quiet(x, 0x7fc00000); }
  static F join24(const std::uint16_t* p, const std::uint8_t* c) {
    const I low = _mm512_slli_epi32(_mm512_cvtepi8_epi32(load8(c)), 8);
    return as_f(iadd(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(p)), 16), low));
  }
  static F toward(F step, F x) {
    const F sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_OQ), x, _mm512_or_ps(sign, step));
  }

  static __m128i load8(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static I iset(std::uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static I as_i(F x) { return _mm512_castps_si512(x); }
  static F as_f(I x) { return _mm512_castsi512_ps(x); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I iand(I a, I b) { return _mm512_and_si512(a, b); }
  static I ior(I a, I b) { return _mm512_or_si512(a, b); }
  static I ixor(I a, I b) { return _mm512_xor_si512(a, b); }
  static I imin(I a, I b) { return _mm512_min_epu32(a, b); }
  static I imax(I a, I b) { return _mm512_max_epu32(a, b); }
  template <int K>
  static I shl(I a) { return _mm512_slli_epi32(a, K); }
  template <int K>
  static I shr(I a) { return _mm512_srli_epi32(a, K); }
  static I lane_steps() {
    return imul(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), iset(0x9e3779b9u));
  }
  static std::uint32_t largest(I a) { return _mm512_reduce_max_epu32(a); }
  static I load_signed_bytes(const std::uint8_t* p) { return _mm512_cvtepi8_epi32(load8(p)); }
  static I load_bytes(const std::uint8_t* p) { return _mm512_cvtepu8_epi32(load8(p)); }
  static void store_halves(std::uint16_t* p, const I (&x)[4]) {
    const I order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi64(order, _mm512_packus_epi32(x[0], x[1])));
    _mm512_storeu_si512(p + 32, _mm512_permutexvar_epi64(order, _mm512_packus_epi32(x[2], x[3])));
  }
  template <int BASE>
  static I pack_bytes(const I (&x)[4]) {  // packing works on quarters of a vector: in_order() puts them right
    const I base = _mm512_set1_epi16(BASE);
    return _mm512_packus_epi16(_mm512_sub_epi16(_mm512_packus_epi32(x[0], x[1]), base),
                               _mm512_sub_epi16(_mm512_packus_epi32(x[2], x[3]), base));
  }
  static I in_order(I x) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
  }
  template <int BASE, int LEAST>
  static void store_bytes(std::uint8_t* p, const I (&x)[4]) {
    I bytes = pack_bytes<BASE>(x);
    if (LEAST > 0) bytes = _mm512_max_epu8(bytes, _mm512_set1_epi8(LEAST));
    _mm512_storeu_si512(p, in_order(bytes));
  }
  template <int BASE>
  static void store_signed_bytes(std::uint8_t* p, const I (&x)[4], const F* sign) {
    // Saturation makes of a float's bits the largest or the smallest integer, as its sign says.
    const I signs = _mm512_packs_epi16(_mm512_packs_epi32(as_i(sign[0]), as_i(sign[1])),
                                       _mm512_packs_epi32(as_i(sign[2]), as_i(sign[3])));
    _mm512_storeu_si512(p, in_order(ior(pack_bytes<BASE>(x), iand(signs, iset(0x80808080u)))));
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
