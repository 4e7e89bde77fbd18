// The kernels, written once over a vector type `V` and compiled once per instruction set, inside its namespace.
//
// [Note: rounding sequence] Every operation rounds once to fp32; fma() is one rounding for everyone, and where it is
// not written the product and the sum round separately. With t the step and constants computed in double, then cast:
//
//   g = (g * unscale) * clip              clip carries the sign of `maximize`; 1.0 changes nothing
//   coupled:    g = fma(l2, w, g)         decoupled:  w = w * (1 - lr * weight_decay)
//   m = fma(1 - beta1, g - m, m)          or, for 1 - beta1 >= 0.5:  m = g - (g - m) * beta1', fused
//   v = fma((1 - beta2) * g, g, v * beta2)
//   d = sqrt(v) / sqrt(1 - beta2^t) + eps
//   w = w + (-(lr / (1 - beta1^t)) * m) / d
//
// These are the roundings of torch's mul_, lerp_, addcmul_, div, add and addcdiv_ on AVX2 and AVX-512, vector body
// and tail alike. The square root is IEEE's.

template <int D>
struct Elem {
  using T = std::uint16_t;
};
template <>
struct Elem<kF32> {
  using T = float;
};

template <int D>
inline V::F load(const typename Elem<D>::T* p) {
  if constexpr (D == kF32) return V::load_f32(p);
  else if constexpr (D == kBF16) return V::load_bf16(p);
  else return V::load_f16(p);
}

// Returns what a load would give back.
template <int D>
inline V::F store(typename Elem<D>::T* p, V::F x) {
  if constexpr (D == kF32) {
    V::store_f32(p, x);
    return x;
  } else if constexpr (D == kBF16) {
    return V::store_bf16(p, x);
  } else {
    return V::store_f16(p, x);
  }
}

template <int FMT>
struct Layout;
template <>
struct Layout<kMasterIsParam> {
  using Param = float;
  using Master = char;
  static constexpr bool kHasMaster = false;
  static V::F load(const float* p, const char*) { return V::load_f32(p); }
  static void store(float* p, char*, V::F w) { V::store_f32(p, w); }
};
template <>
struct Layout<kLossless> {
  using Param = std::uint16_t;
  using Master = std::int16_t;
  static constexpr bool kHasMaster = true;
  static V::F load(const Param* p, const Master* r) { return V::join(p, r); }
  static void store(Param* p, Master* r, V::F w) { V::split(p, r, w); }
};
template <>
struct Layout<kMasterBF16> {
  using Param = std::uint16_t;
  using Master = float;
  static constexpr bool kHasMaster = true;
  static V::F load(const Param*, const float* m) { return V::load_f32(m); }
  static void store(Param* p, float* m, V::F w) {
    V::store_f32(m, w);
    V::store_bf16(p, w);
  }
};
template <>
struct Layout<kMasterF16> {
  using Param = std::uint16_t;
  using Master = float;
  static constexpr bool kHasMaster = true;
  static V::F load(const Param*, const float* m) { return V::load_f32(m); }
  static void store(Param* p, float* m, V::F w) {
    V::store_f32(m, w);
    V::store_f16(p, w);
  }
};

// The constants of a step, broadcast once per call.
struct Constants {
  V::F unscale, clip, decay, l2, lerp, lerp_rest, beta2, one_minus_beta2, bias2_sqrt, eps, step_size;
  bool coupled, lerp_from_end;
  explicit Constants(const StepArgs& a)
      : unscale(V::set1(a.unscale)), clip(V::set1(a.clip)), decay(V::set1(a.decay)), l2(V::set1(a.l2)),
        lerp(V::set1(a.lerp)), lerp_rest(V::set1(a.lerp_rest)), beta2(V::set1(a.beta2)),
        one_minus_beta2(V::set1(a.one_minus_beta2)), bias2_sqrt(V::set1(a.bias2_sqrt)), eps(V::set1(a.eps)),
        step_size(V::set1(a.step_size)), coupled(a.coupled), lerp_from_end(a.lerp_from_end) {}
};

// See [Note: rounding sequence]. GENERAL pays for two branches that ordinary AdamW never takes.
template <int FMT, int GRAD, bool GENERAL>
inline void step_lanes(const Constants& c, typename Layout<FMT>::Param* param, typename Layout<FMT>::Master* master,
                       const typename Elem<GRAD>::T* grad, float* exp_avg, float* exp_avg_sq) {
  V::F g = V::mul(V::mul(load<GRAD>(grad), c.unscale), c.clip);
  V::F w = Layout<FMT>::load(param, master);
  if (GENERAL && c.coupled) g = V::fma(w, c.l2, g);
  else w = V::mul(w, c.decay);
  V::F m = V::load_f32(exp_avg);
  const V::F diff = V::sub(g, m);
  if (GENERAL && c.lerp_from_end) m = V::fnma(diff, c.lerp_rest, g);
  else m = V::fma(c.lerp, diff, m);
  V::F v = V::mul(V::load_f32(exp_avg_sq), c.beta2);
  v = V::fma(V::mul(c.one_minus_beta2, g), g, v);
  const V::F denom = V::add(V::div(V::sqrt(v), c.bias2_sqrt), c.eps);
  w = V::add(w, V::div(V::mul(c.step_size, m), denom));
  V::store_f32(exp_avg, m);
  V::store_f32(exp_avg_sq, v);
  Layout<FMT>::store(param, master, w);
}

// Half a page ahead was the best distance measured, for one thread above all. Past an array's end it is a hint without
// effect. One lane at a time has other costs.
template <int WRITE = 0>
inline void prefetch(const void* p) {
  if (V::N > 1) __builtin_prefetch(static_cast<const char*>(p) + 2048, WRITE);
}

template <int FMT, int GRAD, bool GENERAL>
void step_range(const StepArgs& a, std::size_t begin, std::size_t end) {
  using L = Layout<FMT>;
  using G = typename Elem<GRAD>::T;
  const Constants c(a);
  auto* param = static_cast<typename L::Param*>(a.param);
  auto* master = static_cast<typename L::Master*>(a.master);
  auto* grad = static_cast<const G*>(a.grad);
  std::size_t i = begin;
  for (; i + V::N <= end; i += V::N) {
    prefetch<1>(param + i);
    if (L::kHasMaster) prefetch<1>(master + i);
    prefetch(grad + i);
    prefetch<1>(a.exp_avg + i);
    prefetch<1>(a.exp_avg_sq + i);
    step_lanes<FMT, GRAD, GENERAL>(c, param + i, L::kHasMaster ? master + i : nullptr, grad + i, a.exp_avg + i,
                                   a.exp_avg_sq + i);
  }
  const std::size_t rest = end - i;
  if (V::N == 1 || rest == 0) return;
  // The remainder passes through full-width buffers, so that nothing beyond the arrays is touched.
  typename L::Param p[V::N] = {};
  typename L::Master x[V::N] = {};
  G g[V::N] = {};
  float m[V::N] = {}, v[V::N] = {};
  __builtin_memcpy(p, param + i, rest * sizeof p[0]);
  if (L::kHasMaster) __builtin_memcpy(x, master + i, rest * sizeof x[0]);
  __builtin_memcpy(g, grad + i, rest * sizeof g[0]);
  __builtin_memcpy(m, a.exp_avg + i, rest * sizeof m[0]);
  __builtin_memcpy(v, a.exp_avg_sq + i, rest * sizeof v[0]);
  step_lanes<FMT, GRAD, GENERAL>(c, p, x, g, m, v);
  __builtin_memcpy(param + i, p, rest * sizeof p[0]);
  if (L::kHasMaster) __builtin_memcpy(master + i, x, rest * sizeof x[0]);
  __builtin_memcpy(a.exp_avg + i, m, rest * sizeof m[0]);
  __builtin_memcpy(a.exp_avg_sq + i, v, rest * sizeof v[0]);
}

// [Note: sum of squares] Element i of a block adds its square, exact in double, to lane i % 16, in order; the lanes
// and then the blocks are summed pairwise. The order is that of the elements' indices alone.
struct LaneSums {
  static constexpr int kParts = kStatLanes / V::N;
  V::Sum part[kParts];
  double total() const {
    double lane[kStatLanes];
    for (int k = 0; k < kParts; ++k) part[k].store(lane + k * V::N);
    for (int width = kStatLanes / 2; width > 0; width /= 2)
      for (int k = 0; k < width; ++k) lane[k] += lane[k + width];
    return lane[0];
  }
};

template <int DST, int SRC, bool ACCUMULATE>
inline V::F intake_lanes(typename Elem<DST>::T* dst, const typename Elem<SRC>::T* src) {
  V::F x = load<SRC>(src);
  if constexpr (ACCUMULATE) x = V::add(load<DST>(dst), x);
  return store<DST>(dst, x);
}

template <int DST, int SRC, bool ACCUMULATE>
double intake_block(void* dst_, const void* src_, std::size_t n) {
  using D = typename Elem<DST>::T;
  using S = typename Elem<SRC>::T;
  auto* dst = static_cast<D*>(dst_);
  auto* src = static_cast<const S*>(src_);
  LaneSums sums;
  std::size_t i = 0;
  for (; i + kStatLanes <= n; i += kStatLanes)
    for (int k = 0; k < LaneSums::kParts; ++k)
      sums.part[k].add_square(intake_lanes<DST, SRC, ACCUMULATE>(dst + i + k * V::N, src + i + k * V::N));
  if (const std::size_t rest = n - i) {
    D d[kStatLanes] = {};
    S s[kStatLanes] = {};
    if (ACCUMULATE) __builtin_memcpy(d, dst + i, rest * sizeof d[0]);
    __builtin_memcpy(s, src + i, rest * sizeof s[0]);
    for (int k = 0; k < LaneSums::kParts; ++k)
      sums.part[k].add_square(intake_lanes<DST, SRC, ACCUMULATE>(d + k * V::N, s + k * V::N));
    __builtin_memcpy(dst + i, d, rest * sizeof d[0]);
  }
  return sums.total();
}

template <int SRC>
double stats_block(const void* src_, std::size_t n) {
  using S = typename Elem<SRC>::T;
  auto* src = static_cast<const S*>(src_);
  LaneSums sums;
  std::size_t i = 0;
  for (; i + kStatLanes <= n; i += kStatLanes)
    for (int k = 0; k < LaneSums::kParts; ++k) sums.part[k].add_square(load<SRC>(src + i + k * V::N));
  if (const std::size_t rest = n - i) {
    S s[kStatLanes] = {};
    __builtin_memcpy(s, src + i, rest * sizeof s[0]);
    for (int k = 0; k < LaneSums::kParts; ++k) sums.part[k].add_square(load<SRC>(s + k * V::N));
  }
  return sums.total();
}

void split_range(const float* master, std::uint16_t* param, std::int16_t* remainder, std::size_t n) {
  std::size_t i = 0;
  for (; i + V::N <= n; i += V::N) V::split(param + i, remainder + i, V::load_f32(master + i));
  const std::size_t rest = n - i;
  if (V::N == 1 || rest == 0) return;
  float x[V::N] = {};
  std::uint16_t p[V::N];
  std::int16_t r[V::N];
  __builtin_memcpy(x, master + i, rest * sizeof x[0]);
  V::split(p, r, V::load_f32(x));
  __builtin_memcpy(param + i, p, rest * sizeof p[0]);
  __builtin_memcpy(remainder + i, r, rest * sizeof r[0]);
}

void join_range(const std::uint16_t* param, const std::int16_t* remainder, float* master, std::size_t n) {
  std::size_t i = 0;
  for (; i + V::N <= n; i += V::N) V::store_f32(master + i, V::join(param + i, remainder + i));
  const std::size_t rest = n - i;
  if (V::N == 1 || rest == 0) return;
  std::uint16_t p[V::N] = {};
  std::int16_t r[V::N] = {};
  float x[V::N];
  __builtin_memcpy(p, param + i, rest * sizeof p[0]);
  __builtin_memcpy(r, remainder + i, rest * sizeof r[0]);
  V::store_f32(x, V::join(p, r));
  __builtin_memcpy(master + i, x, rest * sizeof x[0]);
}

// The step's traffic without its arithmetic, for benchmarks: four streams read, three of them written back; a rest of
// less than four vectors is left out. Plain, and the fastest of the loops tried: four vectors at a time, no prefetch,
// and all loads first, since arrays that lie alike in their pages make a load wait for a store just before it.
void stream_range(const float* read, float* a, float* b, float* c, std::size_t n) {
  constexpr int kUnroll = 4;
  float* const written[3] = {a, b, c};
  for (std::size_t i = 0; i + kUnroll * V::N <= n; i += kUnroll * V::N) {
    V::F x[kUnroll], y[3][kUnroll];
    for (int k = 0; k < kUnroll; ++k) x[k] = V::load_f32(read + i + k * V::N);
    for (int s = 0; s < 3; ++s)
      for (int k = 0; k < kUnroll; ++k) y[s][k] = V::load_f32(written[s] + i + k * V::N);
    for (int s = 0; s < 3; ++s)
      for (int k = 0; k < kUnroll; ++k) V::store_f32(written[s] + i + k * V::N, V::add(y[s][k], x[k]));
  }
}

#define CPU_ADAM_STEP(F, G) {&step_range<F, G, false>, &step_range<F, G, true>}
#define CPU_ADAM_STEPS(F) {CPU_ADAM_STEP(F, kF32), CPU_ADAM_STEP(F, kBF16), CPU_ADAM_STEP(F, kF16)}
#define CPU_ADAM_INTAKE(D, S) {&intake_block<D, S, false>, &intake_block<D, S, true>}
#define CPU_ADAM_INTAKES(D) {CPU_ADAM_INTAKE(D, kF32), CPU_ADAM_INTAKE(D, kBF16), CPU_ADAM_INTAKE(D, kF16)}
#define CPU_ADAM_KERNELS(NAME)                                                                                     \
  {                                                                                                                \
    NAME, {CPU_ADAM_STEPS(kMasterIsParam), CPU_ADAM_STEPS(kLossless), CPU_ADAM_STEPS(kMasterBF16),                 \
           CPU_ADAM_STEPS(kMasterF16)},                                                                            \
        {CPU_ADAM_INTAKES(kF32), CPU_ADAM_INTAKES(kBF16), CPU_ADAM_INTAKES(kF16)},                                 \
        {&stats_block<kF32>, &stats_block<kBF16>, &stats_block<kF16>}, &split_range, &join_range, &stream_range    \
  }
