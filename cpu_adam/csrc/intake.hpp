// Taking gradients in, their statistics, and moving masters between layouts. Included inside a namespace.

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

// A step's traffic without its arithmetic, for benchmarks: each array is read, and those that the step writes are
// written back, a group after the other as the step does. Bytes of a group that do not fill a vector are left out.
void stream_range(const StreamArray* arrays, int count, std::size_t begin, std::size_t end) {
  constexpr std::size_t kBytes = sizeof(V::F);
  V::I sum = V::iset(0);
  for (std::size_t group = begin / kGroup; group < end / kGroup; ++group) {
    for (int k = 0; k < count; ++k) {
      char* const data = arrays[k].data + group * arrays[k].group_bytes;
      for (std::size_t at = 0; at + kBytes <= arrays[k].group_bytes; at += kBytes) {
        auto* const p = reinterpret_cast<float*>(data + at);
        const V::I x = V::as_i(V::load_f32(p));
        if (arrays[k].written) V::store_f32(p, V::as_f(V::iadd(x, V::iset(1))));
        else sum = V::imax(sum, x);
      }
    }
  }
  volatile std::uint32_t kept = V::largest(sum);
  (void)kept;
}
