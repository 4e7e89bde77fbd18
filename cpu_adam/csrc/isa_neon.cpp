// See [Note: no inline code here] in kernels.hpp for what may be included.
#include <arm_neon.h>

#include "kernels.hpp"

namespace cpu_adam::isa_neon {
namespace {
#include "vec_neon.hpp"

#include "body.hpp"
}  // namespace

const Kernels kKernels = CPU_ADAM_KERNELS("neon");

}  // namespace cpu_adam::isa_neon
