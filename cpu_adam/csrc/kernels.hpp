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
enum Format : int {
  kMasterIsParam = 0,  // param fp32
  kLossless = 1,       // param bf16 (half away from zero) + int16 remainder
  kMasterBF16 = 2,     // fp32 master; param is its bf16 (nearest even)
  kMasterF16 = 3,      // fp32 master; param is its fp16 (nearest even)
  kFormats = 4,
};

// Statistics are summed in blocks of this many elements, over this many lanes in each, on every CPU.
constexpr std::size_t kBlock = 4096;
constexpr int kStatLanes = 16;

struct StepArgs {
  void* param;
  void* master;  // null, int16 remainder or fp32, by format
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float unscale;
  float clip;         // negated to maximize: a sign is exact wherever it is applied
  float decay;        // 1 - lr * weight_decay when decoupled, else 1
  float l2;           // weight_decay when coupled
  float lerp;         // 1 - beta1
  float lerp_rest;    // 1 - lerp, in fp32, as torch computes it
  float beta2;
  float one_minus_beta2;
  float bias2_sqrt;
  float eps;
  float step_size;    // -(lr / (1 - beta1^t))
  bool coupled;       // add l2 * weight to the gradient
  bool lerp_from_end; // torch's lerp works from the far end for weights of one half or more
};

using StepFn = void (*)(const StepArgs&, std::size_t begin, std::size_t end);
using IntakeFn = double (*)(void* dst, const void* src, std::size_t n);  // one block; returns its sum of squares
using StatsFn = double (*)(const void* src, std::size_t n);
using SplitFn = void (*)(const float* master, std::uint16_t* param, std::int16_t* rest, std::size_t n);
using JoinFn = void (*)(const std::uint16_t* param, const std::int16_t* rest, float* master, std::size_t n);
using StreamFn = void (*)(const float* read, float* a, float* b, float* c, std::size_t n);

struct Kernels {
  const char* name;
  StepFn step[kFormats][kDtypes][2];           // format, gradient dtype, general arithmetic
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

}  // namespace cpu_adam
