// See [Note: no inline code here] in kernels.hpp for what may be included.
#include <immintrin.h>

#include "kernels.hpp"

namespace cpu_adam::isa_avx512 {
namespace {
#include "vec_avx512.hpp"

#include "body.hpp"
}  // namespace

const Kernels kKernels = CPU_ADAM_KERNELS("avx512");

}  // namespace cpu_adam::isa_avx512
