#include "dispatch.hpp"

#ifdef CPU_ADAM_X86
#include <cpuid.h>
#endif

namespace cpu_adam {
namespace {

#ifdef CPU_ADAM_X86
struct Cpu {
  bool avx2 = false;
  bool avx512 = false;
};

constexpr unsigned bit(int n) { return 1u << n; }
constexpr bool has(unsigned value, unsigned mask) { return (value & mask) == mask; }

// The registers that the operating system saves on a context switch (XCR0).
unsigned saved_state() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

Cpu detect() {
  Cpu cpu;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  constexpr unsigned kFma = bit(12), kOsxsave = bit(27), kAvx = bit(28), kF16c = bit(29);
  if (!has(c, kFma | kOsxsave | kAvx | kF16c)) return cpu;
  constexpr unsigned kSse = bit(1), kYmm = bit(2), kOpmask = bit(5), kZmmLow = bit(6), kZmmHigh = bit(7);
  const unsigned saved = saved_state();
  if (!has(saved, kSse | kYmm) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
  constexpr unsigned kAvx2 = bit(5), kF = bit(16), kDq = bit(17), kBw = bit(30), kVl = bit(31);
  cpu.avx2 = has(b, kAvx2);
  cpu.avx512 = cpu.avx2 && has(b, kF | kDq | kBw | kVl) && has(saved, kOpmask | kZmmLow | kZmmHigh);
  return cpu;
}
#endif

}  // namespace

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> list = [] {
    std::vector<const Kernels*> found;
#ifdef CPU_ADAM_X86
    const Cpu cpu = detect();
    if (cpu.avx512) found.push_back(&isa_avx512::kKernels);
    if (cpu.avx2) found.push_back(&isa_avx2::kKernels);
#endif
#ifdef CPU_ADAM_NEON
    found.push_back(&isa_neon::kKernels);
#endif
    found.push_back(&isa_scalar::kKernels);
    return found;
  }();
  return list;
}

}  // namespace cpu_adam
