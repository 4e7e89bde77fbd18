// The kernels, written once over a vector type `V` and compiled once per instruction set, inside its namespace.
#include "elements.hpp"
#include "intake.hpp"
#include "moments.hpp"
#include "rule_adagrad.hpp"
#include "rule_adam.hpp"
#include "rule_lion.hpp"
#include "step.hpp"

// The table of an instruction set. What a rule has no general form for is there twice.
#define CPU_ADAM_STEP(R, X, M, G) {&step_range<R<false>, X, M, G>, &step_range<R<true>, X, M, G>}
#define CPU_ADAM_GRADS(R, X, M) {CPU_ADAM_STEP(R, X, M, kF32), CPU_ADAM_STEP(R, X, M, kBF16), CPU_ADAM_STEP(R, X, M, kF16)}
#define CPU_ADAM_NOTHING {{nullptr, nullptr}, {nullptr, nullptr}, {nullptr, nullptr}}
#define CPU_ADAM_MOMENTS(R, X) \
  {CPU_ADAM_GRADS(R, X, kMomentsF32), CPU_ADAM_GRADS(R, X, kMomentsBF16), CPU_ADAM_GRADS(R, X, kMomentsInt8)}
#define CPU_ADAM_RULE(R)                                                                                         \
  {CPU_ADAM_MOMENTS(R, kMasterIsParam), CPU_ADAM_MOMENTS(R, kLossless), CPU_ADAM_MOMENTS(R, kMasterBF16),        \
   CPU_ADAM_MOMENTS(R, kMasterF16), {CPU_ADAM_NOTHING, CPU_ADAM_NOTHING, CPU_ADAM_GRADS(R, kMaster24, kMomentsInt8)}}
#define CPU_ADAM_INTAKE(D, S) {&intake_block<D, S, false>, &intake_block<D, S, true>}
#define CPU_ADAM_INTAKES(D) {CPU_ADAM_INTAKE(D, kF32), CPU_ADAM_INTAKE(D, kBF16), CPU_ADAM_INTAKE(D, kF16)}
#define CPU_ADAM_KERNELS(NAME)                                                                                     \
  {                                                                                                                \
    NAME, {CPU_ADAM_RULE(AdamRule), CPU_ADAM_RULE(LionRule), CPU_ADAM_RULE(AdagradRule)},                          \
        {CPU_ADAM_INTAKES(kF32), CPU_ADAM_INTAKES(kBF16), CPU_ADAM_INTAKES(kF16)},                                 \
        {&stats_block<kF32>, &stats_block<kBF16>, &stats_block<kF16>}, &split_range, &join_range, &stream_range    \
  }
