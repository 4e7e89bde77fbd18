// What the instruction-set builds and their callers share.
//
// [Note: no inline code here] This header is seen by translation units that are compiled for wider instruction
// sets. An inline function or a template instantiated in one of them may be the copy that the linker keeps for all,
// and would then fault on a smaller CPU. So: plain data only, here; whatever computes lives in a namespace per ISA.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cpu_adam {

enum Dtype : int { kF32 = 0, kBF16 = 1, kF16 = 2, kDtypes = 3 };

// How the fp32 master weight is laid out.
enum Master : int {
  kMasterIsParam = 0,  // param fp32
  kLossless = 1,       // param bf16 (half away from zero) + int16 remainder
  kMasterBF16 = 2,     // fp32 master; param is its bf16 (nearest even)
  kMasterF16 = 3,      // fp32 master; param is its fp16 (nearest even)
  kMaster24 = 4,       // param bf16 + int8 correction in 1/256 of its last place; goes with 8-bit moments alone
  kMasters = 5,
};

// How the moments are kept. The lossy ones round by chance: see [Note: noise] in moments.hpp.
enum Moments : int {
  kMomentsF32 = 0,
  kMomentsBF16 = 1,
  kMomentsInt8 = 2,  // codes, with a scale for each moment of each group
  kMomentFormats = 3,
};

// The second index of the table of steps; each has a file rule_*.hpp.
enum Rule : int { kAdam = 0, kLion = 1, kAdagrad = 2, kRules = 3 };

// Elements that share a scale, and a key of the noise.
constexpr std::size_t kGroup = 64;

// Statistics are summed in blocks of this many elements, over this many lanes in each, on every CPU.
constexpr std::size_t kBlock = 4096;
constexpr int kStatLanes = 16;

// Constants that a rule may have; what each means is the rule's own matter.
constexpr int kConstants = 10;

struct StepArgs {
  void* param;
  void* master;      // null, int16, int8 or fp32, by layout
  const void* grad;
  void* exp_avg;     // null where the rule has none
  void* exp_avg_sq;  // null where the rule has none
  float* scale;      // 8-bit moments: for each group one for each moment that the rule has, exp_avg first
  float unscale;
  float clip;  // negated to maximize: a sign is exact wherever it is applied
  float constants[kConstants];
  std::uint64_t key;    // of seed and step
  std::uint64_t group;  // which group of its sequence the first element begins
};

// An array of which a group takes so many bytes.
struct StreamArray {
  char* data;
  std::size_t group_bytes;
  bool written;
};

using StepFn = void (*)(const StepArgs&, std::size_t begin, std::size_t end);
using IntakeFn = double (*)(void* dst, const void* src, std::size_t n);  // one block; returns its sum of squares
using StatsFn = double (*)(const void* src, std::size_t n);
using SplitFn = void (*)(const float* master, std::uint16_t* param, std::int16_t* rest, std::size_t n);
using JoinFn = void (*)(const std::uint16_t* param, const std::int16_t* rest, float* master, std::size_t n);
using StreamFn = void (*)(const StreamArray* arrays, int count, std::size_t begin, std::size_t end);

struct Kernels {
  const char* name;
  // Rule, master layout, moments, gradient dtype, general arithmetic; null where a combination is not offered.
  StepFn step[kRules][kMasters][kMomentFormats][kDtypes][2];
  IntakeFn intake[kDtypes][kDtypes][2];        // dst dtype, src dtype, accumulate
  StatsFn stats[kDtypes];
  SplitFn split;
  JoinFn join;
  StreamFn stream;
};

// Constant-initialized: nothing compiled for a wider instruction set may run at load time.
namespace isa_scalar {
extern const Kernels kKernels;
}
#ifdef CPU_ADAM_X86
namespace isa_avx2 {
extern const Kernels kKernels;
}
namespace isa_avx512 {
extern const Kernels kKernels;
}
#endif
#ifdef CPU_ADAM_NEON
namespace isa_neon {
extern const Kernels kKernels;
}
#endif

}  // namespace cpu_adam
