// Which processors share a memory controller.
#pragma once

#include <string>
#include <vector>

namespace cpu_adam {

// The processors that this process may use, by NUMA node, from the folder where Linux describes them. One list with all
// of them where there is one node, or none is described.
std::vector<std::vector<int>> numa_nodes(const std::string& folder);

// /sys/devices/system/node, or what the environment variable TIERFLOW_NODE_DIR says.
std::string node_folder();

}  // namespace cpu_adam
