// Which builds of the kernels this CPU and operating system can run.
#pragma once

#include <vector>

#include "kernels.hpp"

namespace cpu_adam {

// Best first; the scalar build is always there.
const std::vector<const Kernels*>& available();

}  // namespace cpu_adam
