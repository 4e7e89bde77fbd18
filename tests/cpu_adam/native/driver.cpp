// Runs every kernel of every build that this CPU has on the same inputs as the scalar build, which shares no
// instruction with them, and prints a hash of the scalar results: it must be that of any other machine. Python is not
// needed, so that it also runs under an emulator of another architecture.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "dispatch.hpp"
#include "launch.hpp"

using namespace cpu_adam;

namespace {

using Bytes = std::vector<unsigned char>;

struct Random {
  std::uint64_t state;
  std::uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return std::uint32_t(state >> 33) ^ std::uint32_t(state >> 13);
  }
};

// One value in 64 is any bit pattern, infinities and NaN among them; the others are of the size of gradients.
Bytes floats(Random& random, std::size_t n, Dtype dtype, bool ordinary) {
  Bytes out(n * (dtype == kF32 ? 4 : 2));
  for (std::size_t i = 0; i < n; ++i) {
    std::uint32_t u = random.next();
    const bool any = !ordinary && random.next() % 64 == 0;
    if (!any) u = (u & 0x807fffffu) | (100u + random.next() % 28u) << 23;
    if (dtype == kF32) std::memcpy(&out[i * 4], &u, 4);
    std::uint16_t h = std::uint16_t(u >> 16);
    if (dtype == kF16 && !any) h = std::uint16_t((h & 0x83ffu) | (1u + random.next() % 24u) << 10);
    if (dtype != kF32) std::memcpy(&out[i * 2], &h, 2);
  }
  return out;
}

// A NaN has defined bits only where it is rounded or split; one is put in the place of all.
void canonical(Bytes& data, Dtype dtype) {
  for (std::size_t i = 0; dtype == kF32 && i < data.size(); i += 4) {
    std::uint32_t u;
    std::memcpy(&u, &data[i], 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) u = 0x7fc00000u;
    std::memcpy(&data[i], &u, 4);
  }
  for (std::size_t i = 0; dtype == kF16 && i < data.size(); i += 2) {
    std::uint16_t h;
    std::memcpy(&h, &data[i], 2);
    if ((h & 0x7fffu) > 0x7c00u) h = 0x7e00u;
    std::memcpy(&data[i], &h, 2);
  }
}

std::uint64_t hash = 14695981039346656037u;
int failures = 0;

void add(const void* data, std::size_t n) {
  auto* p = static_cast<const unsigned char*>(data);
  for (std::size_t i = 0; i < n; ++i) hash = (hash ^ p[i]) * 1099511628211u;
}

// The scalar build comes last in the list; what it gives is hashed, what the others give is compared.
struct Check {
  std::string what;
  std::vector<Bytes> expected;
  void operator()(const char* isa, const std::vector<Bytes>& got, bool scalar) {
    if (scalar) for (const Bytes& b : got) add(b.data(), b.size());
    if (expected.empty()) expected = got;
    else if (expected != got) ++failures, std::printf("%s: %s differs from the first build\n", what.c_str(), isa);
  }
};

struct State {
  Bytes param, master, grad, m, v, scale;
};

constexpr int kParamSize[] = {4, 2, 2, 2, 2}, kMasterSize[] = {0, 2, 4, 4, 1}, kMomentSize[] = {4, 2, 1};
constexpr Dtype kParamDtype[] = {kF32, kBF16, kBF16, kF16, kBF16};

Bytes master_of(Random& random, Master layout, std::size_t n) {
  if (kMasterSize[layout] == 4) return floats(random, n, kF32, false);
  Bytes out(n * kMasterSize[layout]);
  for (auto& b : out) b = static_cast<unsigned char>(random.next());
  return out;
}

void check_step(Rule rule, Master master, Moments moments, Dtype grad, bool general, std::size_t n) {
  const std::size_t groups = (n + kGroup - 1) / kGroup;
  Random random{rule * 1000003u + master * 10007u + moments * 101u + grad * 11u + n};
  State start{floats(random, n, kParamDtype[master], false), master_of(random, master, n), floats(random, n, grad, false),
              Bytes(n * kMomentSize[moments]), Bytes(n * kMomentSize[moments]), Bytes(groups * 8)};
  StepArgs args{};
  const float adam[] = {0.99999f, general ? 0.01f : 0.0f, general ? 0.6f : 0.1f, 0.999f, 0.001f, 0.7f, 1e-8f, -1e-3f};
  const float lion[] = {0.9999f, 0.1f, 0.01f, 1e-3f};
  const float adagrad[] = {0.01f, 1e-10f, -1e-2f};
  if (rule == kAdam) std::memcpy(args.constants, adam, sizeof adam);
  if (rule == kLion) std::memcpy(args.constants, lion, sizeof lion);
  if (rule == kAdagrad) std::memcpy(args.constants, adagrad, sizeof adagrad);
  args.unscale = 0.5f, args.clip = 0.9f, args.key = 0x123456789abcdef0u, args.group = 1u << 27;
  Check check{"step rule " + std::to_string(rule) + " master " + std::to_string(master) + " moments " +
              std::to_string(moments) + " grad " + std::to_string(grad) + " n " + std::to_string(n), {}};
  for (const Kernels* k : available()) {
    const StepFn step = step_function(*k, rule, master, moments, grad, general);
    if (step == nullptr) return;
    State s = start;
    args.param = s.param.data(), args.master = s.master.data(), args.grad = s.grad.data();
    args.exp_avg = s.m.data(), args.exp_avg_sq = s.v.data();
    args.scale = reinterpret_cast<float*>(s.scale.data());
    for (int t = 0; t < 3; ++t, ++args.key) launch_steps({{step, args, n}}, 1 + t);
    args.key -= 3;
    canonical(s.param, kParamDtype[master]);
    if (kMasterSize[master] == 4) canonical(s.master, kF32);
    if (moments == kMomentsF32) canonical(s.m, kF32), canonical(s.v, kF32);
    check(k->name, {s.param, s.master, s.m, s.v, s.scale}, k == available().back());
  }
}

void check_intake(Dtype dst, Dtype src, bool accumulate, std::size_t n) {
  Random random{dst * 7919u + src * 31u + n};
  const Bytes from = floats(random, n, src, true), to = floats(random, n, dst, true);
  Check check{"intake " + std::to_string(dst) + " " + std::to_string(src) + " n " + std::to_string(n), {}};
  for (const Kernels* k : available()) {
    Bytes out = to, sums(16);
    const double total = launch_intake(*k, out.data(), dst, from.data(), src, accumulate, n, 2);
    const double again = launch_stats(*k, out.data(), dst, n, 2);
    std::memcpy(sums.data(), &total, 8);
    std::memcpy(sums.data() + 8, &again, 8);
    check(k->name, {out, sums}, k == available().back());
  }
}

void check_split(std::size_t n) {
  Random random{n};
  const Bytes values = floats(random, n, kF32, false);
  Check check{"split n " + std::to_string(n), {}};
  for (const Kernels* k : available()) {
    Bytes param(n * 2), rest(n * 2), joined(n * 4);
    auto* p = reinterpret_cast<std::uint16_t*>(param.data());
    auto* r = reinterpret_cast<std::int16_t*>(rest.data());
    launch_split(*k, reinterpret_cast<const float*>(values.data()), p, r, n, 2);
    launch_join(*k, p, r, reinterpret_cast<float*>(joined.data()), n, 2);
    check(k->name, {param, rest, joined}, k == available().back());
  }
}

}  // namespace

int main() {
  const std::size_t lengths[] = {1, 3, 15, 16, 17, 63, 64, 65, 129, 4096, 5000};
  for (std::size_t n : lengths) {
    for (int rule = 0; rule < kRules; ++rule)
      for (int master = 0; master < kMasters; ++master)
        for (int moments = 0; moments < kMomentFormats; ++moments)
          for (int grad = 0; grad < kDtypes; ++grad)
            for (int general = 0; general < 2; ++general)
              check_step(Rule(rule), Master(master), Moments(moments), Dtype(grad), general, n);
    for (int dst = 0; dst < kDtypes; ++dst)
      for (int src = 0; src < kDtypes; ++src)
        for (int accumulate = 0; accumulate < 2; ++accumulate) check_intake(Dtype(dst), Dtype(src), accumulate, n);
    check_split(n);
  }
  std::string names;
  for (const Kernels* k : available()) names += std::string(" ") + k->name;
  std::printf("builds:%s\nhash: %016llx\n", names.c_str(), static_cast<unsigned long long>(hash));
  return failures != 0;
}
