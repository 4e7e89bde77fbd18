#include "topology.hpp"

#include <dirent.h>
#include <sched.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>

namespace cpu_adam {
namespace {

std::vector<int> allowed() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> found;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) found.push_back(cpu);
  return found;
}

// "0-3,8": what is not of that form ends the list.
void read_list(const std::string& path, int node, std::map<int, int>& node_of) {
  std::ifstream file(path);
  for (std::string part; std::getline(file, part, ',');) {
    std::istringstream text(part);
    int first, last;
    char dash;
    if (!(text >> first)) return;
    if (!(text >> dash >> last) || dash != '-') last = first;
    for (int cpu = first; cpu <= last && cpu < CPU_SETSIZE; ++cpu) node_of[cpu] = node;
  }
}

}  // namespace

std::string node_folder() {
  const char* chosen = std::getenv("TIERFLOW_NODE_DIR");
  return chosen && *chosen ? chosen : "/sys/devices/system/node";
}

std::vector<std::vector<int>> numa_nodes(const std::string& folder) {
  std::map<int, int> node_of;
  if (DIR* dir = opendir(folder.c_str())) {
    while (const dirent* entry = readdir(dir)) {
      const std::string name = entry->d_name;
      if (name.size() > 4 && name.compare(0, 4, "node") == 0 && name.find_first_not_of("0123456789", 4) == name.npos)
        read_list(folder + "/" + name + "/cpulist", std::atoi(name.c_str() + 4), node_of);
    }
    closedir(dir);
  }
  std::map<int, std::vector<int>> nodes;  // a processor that no node lists counts with the first
  for (int cpu : allowed()) nodes[node_of.count(cpu) ? node_of[cpu] : 0].push_back(cpu);
  std::vector<std::vector<int>> lists;
  for (auto& [node, cpus] : nodes) lists.push_back(std::move(cpus));
  return lists;
}

}  // namespace cpu_adam
