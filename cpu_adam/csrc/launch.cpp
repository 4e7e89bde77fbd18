#include "launch.hpp"

#include <algorithm>
#include <memory>

#include "pool.hpp"

namespace cpu_adam {
namespace {

// A thread takes a grain at a time, so that an unequal machine is evened out: microseconds of work at least, and for
// large arrays long enough runs that the hardware's prefetchers seldom start anew.
constexpr std::size_t kGrainMin = 4 * kBlock;
constexpr std::size_t kGrainMax = 16 * kBlock;
constexpr std::size_t kGrainsPerThread = 8;
// Below this many elements a thread, waking the thread costs more than it brings.
constexpr std::size_t kWorthAThread = 2 * kGrainMin;

constexpr std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

std::size_t useful_threads(std::size_t n, int threads) { return std::min<std::size_t>(threads, n / kWorthAThread); }

std::size_t grain_of(std::size_t n, std::size_t threads) {
  const std::size_t share = ceil_div(n / (threads * kGrainsPerThread), kBlock) * kBlock;
  return std::min(std::max(share, kGrainMin), kGrainMax);
}

template <typename Body>
void for_ranges(std::size_t n, int threads, Body body) {
  const std::size_t useful = useful_threads(n, threads);
  if (useful < 2) {
    if (n != 0) body(std::size_t{0}, n);
    return;
  }
  const std::size_t grain = grain_of(n, useful);
  struct Context {
    Body& body;
    std::size_t n, grain;
  } context{body, n, grain};
  const Task task = [](void* opaque, std::size_t index) {
    auto& c = *static_cast<Context*>(opaque);
    c.body(index * c.grain, std::min(c.n, (index + 1) * c.grain));
  };
  Pool::get().run(task, &context, ceil_div(n, grain), static_cast<int>(useful));
}

double pairwise(const double* values, std::size_t n) {
  if (n == 1) return values[0];
  std::size_t half = 1;
  while (half * 2 < n) half *= 2;
  return pairwise(values, half) + pairwise(values + half, n - half);
}

// See [Note: sum of squares] in body.hpp.
template <typename Block>
double sum_blocks(std::size_t n, int threads, Block block) {
  if (n == 0) return 0.0;
  if (n <= kBlock) return block(std::size_t{0}, n);
  const std::size_t blocks = ceil_div(n, kBlock);
  const std::unique_ptr<double[]> partial(new double[blocks]);
  for_ranges(n, threads, [&](std::size_t begin, std::size_t end) {
    for (std::size_t at = begin; at < end; at += kBlock) partial[at / kBlock] = block(at, std::min(kBlock, end - at));
  });
  return pairwise(partial.get(), blocks);
}

// About a grain of work: from an element of one call up to an element of the same or a later one.
struct Share {
  std::size_t first, begin, last, end;
};

// Long calls are cut at whole blocks, short ones are put together.
std::vector<Share> cut(const std::vector<Call>& calls, std::size_t grain) {
  std::vector<Share> shares;
  Share open{0, 0, 0, 0};
  std::size_t held = 0;
  for (std::size_t k = 0; k < calls.size(); ++k) {
    for (std::size_t at = 0; at < calls[k].n;) {
      const std::size_t room = ceil_div(grain - held, kBlock) * kBlock;
      const std::size_t end = std::min(calls[k].n, at + room);
      if (held == 0) open = {k, at, k, end};
      open.last = k;
      open.end = end;
      held += end - at;
      at = end;
      if (held < grain) continue;
      shares.push_back(open);
      held = 0;
    }
  }
  if (held != 0) shares.push_back(open);
  return shares;
}

void run_share(const std::vector<Call>& calls, const Share& share) {
  for (std::size_t k = share.first; k <= share.last; ++k) {
    const std::size_t begin = k == share.first ? share.begin : 0;
    const std::size_t end = k == share.last ? share.end : calls[k].n;
    if (begin < end) calls[k].step(calls[k].args, begin, end);
  }
}

std::size_t size_of(Dtype dtype) { return dtype == kF32 ? 4 : 2; }

}  // namespace

StepFn step_function(const Kernels& k, Rule rule, Master master, Moments moments, Dtype grad, bool general) {
  return k.step[rule][master][moments][grad][general];
}

void launch_steps(const std::vector<Call>& calls, int threads) {
  std::size_t total = 0;
  for (const Call& call : calls) total += call.n;
  const std::size_t useful = useful_threads(total, threads);
  if (useful < 2) {
    for (const Call& call : calls)
      if (call.n != 0) call.step(call.args, 0, call.n);
    return;
  }
  const std::vector<Share> shares = cut(calls, grain_of(total, useful));
  struct Context {
    const std::vector<Call>& calls;
    const std::vector<Share>& shares;
  } context{calls, shares};
  const Task task = [](void* opaque, std::size_t index) {
    const auto& c = *static_cast<Context*>(opaque);
    run_share(c.calls, c.shares[index]);
  };
  Pool::get().run(task, &context, shares.size(), static_cast<int>(useful));
}

double launch_intake(const Kernels& k, void* dst, Dtype dst_dtype, const void* src, Dtype src_dtype, bool accumulate,
                     std::size_t n, int threads) {
  const IntakeFn intake = k.intake[dst_dtype][src_dtype][accumulate];
  auto* d = static_cast<char*>(dst);
  auto* s = static_cast<const char*>(src);
  return sum_blocks(n, threads, [&](std::size_t at, std::size_t count) {
    return intake(d + at * size_of(dst_dtype), s + at * size_of(src_dtype), count);
  });
}

double launch_stats(const Kernels& k, const void* src, Dtype dtype, std::size_t n, int threads) {
  auto* s = static_cast<const char*>(src);
  return sum_blocks(n, threads, [&](std::size_t at, std::size_t count) {
    return k.stats[dtype](s + at * size_of(dtype), count);
  });
}

void launch_split(const Kernels& k, const float* master, std::uint16_t* param, std::int16_t* remainder,
                  std::size_t n, int threads) {
  for_ranges(n, threads, [&](std::size_t begin, std::size_t end) {
    k.split(master + begin, param + begin, remainder + begin, end - begin);
  });
}

void launch_join(const Kernels& k, const std::uint16_t* param, const std::int16_t* remainder, float* master,
                 std::size_t n, int threads) {
  for_ranges(n, threads, [&](std::size_t begin, std::size_t end) {
    k.join(param + begin, remainder + begin, master + begin, end - begin);
  });
}

void launch_stream(const Kernels& k, const StreamArray* arrays, int count, std::size_t n, int threads) {
  for_ranges(n, threads, [&](std::size_t begin, std::size_t end) { k.stream(arrays, count, begin, end); });
}

}  // namespace cpu_adam
