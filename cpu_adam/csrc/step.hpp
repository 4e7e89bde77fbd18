// One step of one rule over a range, in one pass. Included inside a namespace, after everything that it uses.

// Half a page ahead was the best distance measured, for one thread above all. Past an array's end it is a hint without
// effect. One lane at a time has other costs.
template <int WRITE = 0>
inline void prefetch(const void* p) {
  if (V::N > 1) __builtin_prefetch(static_cast<const char*>(p) + 2048, WRITE);
}

// The cache lines that begin within a group.
template <int WRITE = 0, typename T>
inline void prefetch_group(const T* p) {
  for (std::size_t at = 0; at < kGroup; at += 64 / sizeof(T)) prefetch<WRITE>(p + at);
}

// A copy of a few elements, padded with zeros to whole vectors or groups, so that nothing beyond the arrays is touched.
template <typename T, std::size_t COUNT, bool PRESENT>
struct Padded {
  T data[PRESENT ? COUNT : 1] = {};
  void take(const T* from, std::size_t n) {
    if constexpr (PRESENT) __builtin_memcpy(data, from, n * sizeof(T));
  }
  void give(T* to, std::size_t n) const {
    if constexpr (PRESENT) __builtin_memcpy(to, data, n * sizeof(T));
  }
};

template <class RULE, int MASTER, int MOMENTS, int GRAD>
struct Step {
  using L = Layout<MASTER>;
  using P = typename L::Param;
  using X = typename L::Master;
  using G = typename Elem<GRAD>::T;
  using M = typename MomentElem<MOMENTS>::T;
  static constexpr bool kM = RULE::kExpAvg, kV = RULE::kExpAvgSq;
  static constexpr int kScales = kM + kV;
  static constexpr bool kGroups = MOMENTS != kMomentsF32;
  static constexpr std::size_t kUnit = kGroups ? kGroup : V::N;

  // The arrays at some element; those that the rule or the layout lacks are not to be read.
  struct At {
    P* param;
    X* master;
    const G* grad;
    M* m;
    M* v;
    float* scale;
    At operator+(std::size_t i) const {
      return {param + i, L::kHasMaster ? master + i : master, grad + i, kM ? m + i : m, kV ? v + i : v, scale};
    }
  };

  const RULE rule;
  const V::F unscale, clip;
  explicit Step(const StepArgs& a) : rule(a.constants), unscale(V::set1(a.unscale)), clip(V::set1(a.clip)) {}

  V::F gradient(const G* p) const { return V::mul(V::mul(load<GRAD>(p), unscale), clip); }

  static void fetch(At at) {
    prefetch<1>(at.param);
    if (L::kHasMaster) prefetch<1>(at.master);
    prefetch(at.grad);
    if (kM) prefetch<1>(at.m);
    if (kV) prefetch<1>(at.v);
  }

  static void fetch_group(At at) {
    prefetch_group<1>(at.param);
    if (L::kHasMaster) prefetch_group<1>(at.master);
    prefetch_group(at.grad);
    if (kM) prefetch_group<1>(at.m);
    if (kV) prefetch_group<1>(at.v);
  }

  // fp32 moments: V::N elements.
  void lanes(At at) const {
    const V::F g = gradient(at.grad);
    V::F w = L::load(at.param, at.master);
    V::F m = kM ? load_moment(at.m) : V::set1(0.0f), v = kV ? load_moment(at.v) : V::set1(0.0f);
    rule.update(g, w, m, v);
    if constexpr (kM) V::store_f32(at.m, m);
    if constexpr (kV) V::store_f32(at.v, v);
    L::store(at.param, at.master, w);
  }

  static V::F load_moment(const float* p) { return V::load_f32(p); }
  static V::F load_moment(const std::uint16_t* p) { return V::load_bf16(p); }

  // Four vectors of weights.
  static void store_weights(At at, const V::F (&w)[4], const V::I* random) {
    if constexpr (MASTER == kLossless || MASTER == kMaster24) {
      V::I high[4], low[4];
      for (int k = 0; k < 4; ++k) {
        low[k] = V::rounding_bits(w[k]);
        if (MASTER == kMaster24) low[k] = V::iadd(low[k], V::iand(random[k], V::iset(0xffu)));
        high[k] = V::template shr<16>(V::iadd(low[k], V::iset(0x8000u)));
        if (MASTER == kMaster24) low[k] = V::iand(V::template shr<8>(low[k]), V::iset(0xffu));
        else low[k] = V::iand(low[k], V::iset(0xffffu));
      }
      V::store_halves(at.param, high);
      if constexpr (MASTER == kMaster24) V::template store_bytes<0, 0>(at.master, low);
      else V::store_halves(reinterpret_cast<std::uint16_t*>(at.master), low);
    } else {
      for (std::size_t k = 0; k < 4; ++k) L::store((at + k * V::N).param, (at + k * V::N).master, w[k]);
    }
  }

  // bf16 moments: a group.
  void group16(At at, std::uint32_t key) const {
    for (std::size_t q = 0; q < kGroup; q += 4 * V::N) {
      V::I random[4], m_bits[4], v_bits[4];
      V::F w[4];
#pragma GCC unroll 4
      for (std::size_t k = 0; k < 4; ++k) {
        const At here = at + (q + k * V::N);
        random[k] = noise(key, std::uint32_t(q + k * V::N));
        const V::F g = gradient(here.grad);
        w[k] = L::load(here.param, here.master);
        V::F m = kM ? load_moment(here.m) : V::set1(0.0f), v = kV ? load_moment(here.v) : V::set1(0.0f);
        rule.update(g, w[k], m, v);
        const V::I low = V::iand(random[k], V::iset(0xffffu)), high = V::template shr<16>(random[k]);
        if constexpr (kM) m_bits[k] = V::template shr<16>(V::iadd(V::rounding_bits(m), low));
        if constexpr (kV) v_bits[k] = V::template shr<16>(V::iadd(V::rounding_bits(v), high));
      }
      if constexpr (kM) V::store_halves(at.m + q, m_bits);
      if constexpr (kV) V::store_halves(at.v + q, v_bits);
      store_weights(at + q, w, random);
    }
  }

  // 8-bit moments: a group. The scales are known when all of it has been updated, so the new moments wait on the stack.
  void group8(At at, std::uint32_t key) const {
    constexpr int kVectors = kGroup / V::N;
    static_assert(kVectors % 4 == 0, "codes are stored four vectors at a time");
    V::F m[kVectors], root[kVectors];
    V::I random[kVectors];
    V::I largest_m = V::iset(0), largest_root = V::iset(0);
    const V::F scale_m = V::set1(kM ? at.scale[0] : 0.0f), scale_v = V::set1(kV ? at.scale[kScales - 1] : 0.0f);
    for (int q = 0; q < kVectors; q += 4) {
      V::F w[4];
#pragma GCC unroll 4
      for (int k = q; k < q + 4; ++k) {
        const At here = at + std::size_t(k) * V::N;
        random[k] = noise(key, std::uint32_t(k * V::N));
        const V::F g = gradient(here.grad);
        w[k - q] = L::load(here.param, here.master);
        V::F v = V::set1(0.0f);
        m[k] = v;
        if constexpr (kM) m[k] = ExpAvgCode::decode(here.m, scale_m);
        if constexpr (kV) v = ExpAvgSqCode::decode(here.v, scale_v);
        rule.update(g, w[k - q], m[k], v);
        if constexpr (kM) largest_m = V::imax(largest_m, V::as_i(magnitude(m[k])));
        if constexpr (kV) {
          root[k] = V::sqrt(v);
          // As it is: a NaN is the largest with either sign, and nothing else has one.
          largest_root = V::imax(largest_root, V::as_i(root[k]));
        }
      }
      store_weights(at + std::size_t(q) * V::N, w, random + q);
    }
    if constexpr (kM) at.scale[0] = encode_group<ExpAvgCode>(at.m, m, random, V::largest(largest_m));
    if constexpr (kV) at.scale[kScales - 1] = encode_group<ExpAvgSqCode>(at.v, root, random, V::largest(largest_root));
  }

  // Writes a group's codes and returns its scale.
  template <class CODE>
  static float encode_group(M* to, const V::F* values, const V::I* random, std::uint32_t largest) {
    const GroupScale group(largest, CODE::kTop);
    if (group.inverse == 0.0f) {
      __builtin_memset(to, 0, kGroup);
      return group.scale;
    }
    const V::F inverse = V::set1(group.inverse);
    for (std::size_t k = 0; k < kGroup / V::N; k += 4) CODE::store(to + k * V::N, values + k, random + k, inverse);
    return group.scale;
  }

  void unit(At at, std::uint32_t key) const {
    if constexpr (MOMENTS == kMomentsF32) lanes(at);
    else if constexpr (MOMENTS == kMomentsBF16) group16(at, key);
    else group8(at, key);
  }

  void rest(At at, std::size_t n, std::uint32_t key) const {
    Padded<P, kUnit, true> p;
    Padded<X, kUnit, L::kHasMaster> x;
    Padded<G, kUnit, true> g;
    Padded<M, kUnit, kM> m;
    Padded<M, kUnit, kV> v;
    p.take(at.param, n), x.take(at.master, n), g.take(at.grad, n), m.take(at.m, n), v.take(at.v, n);
    unit({p.data, x.data, g.data, m.data, v.data, at.scale}, key);
    p.give(at.param, n), x.give(at.master, n), m.give(at.m, n), v.give(at.v, n);
  }
};

// `begin` is a multiple of kBlock, and so the first of a group.
template <class RULE, int MASTER, int MOMENTS, int GRAD>
void step_range(const StepArgs& a, std::size_t begin, std::size_t end) {
  using S = Step<RULE, MASTER, MOMENTS, GRAD>;
  const S step(a);
  const typename S::At all{static_cast<typename S::P*>(a.param),  static_cast<typename S::X*>(a.master),
                           static_cast<const typename S::G*>(a.grad), static_cast<typename S::M*>(a.exp_avg),
                           static_cast<typename S::M*>(a.exp_avg_sq), a.scale};
  std::size_t i = begin;
  const auto key_at = [&](std::size_t at) { return S::kGroups ? group_key(a.key, a.group + at / kGroup) : 0u; };
  const auto here = [&](std::size_t at) {
    auto place = all + at;
    if (MOMENTS == kMomentsInt8) place.scale += at / kGroup * S::kScales;
    return place;
  };
  for (; i + S::kUnit <= end; i += S::kUnit) {
    if constexpr (S::kGroups) S::fetch_group(here(i));
    else S::fetch(here(i));
    step.unit(here(i), key_at(i));
  }
  if (S::kUnit > 1 && i < end) step.rest(here(i), end - i, key_at(i));
}
