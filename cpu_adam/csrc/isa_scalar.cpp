// See [Note: no inline code here] in kernels.hpp for what may be included.
#include "kernels.hpp"

namespace cpu_adam::isa_scalar {
namespace {
#include "vec_scalar.hpp"

#include "body.hpp"
}  // namespace

const Kernels kKernels = CPU_ADAM_KERNELS("scalar");

}  // namespace cpu_adam::isa_scalar
