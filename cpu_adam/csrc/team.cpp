#include "team.hpp"

#include <dlfcn.h>
#include <link.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

namespace cpu_adam {
namespace {

// GNU's entry point, which Intel's and LLVM's libraries have too. No header declares it.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

struct OpenMP {
  Parallel parallel = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
};

int note(dl_phdr_info* info, std::size_t, void* found) {
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* name = slash == nullptr ? info->dlpi_name : slash + 1;
  for (const char* known : {"libgomp", "libiomp", "libomp"})
    if (std::strncmp(name, known, std::strlen(known)) == 0) static_cast<std::set<std::string>*>(found)->insert(info->dlpi_name);
  return 0;
}

template <typename Function>
void look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
}

// The one OpenMP runtime that is loaded; of several, nobody can say which is torch's.
OpenMP find() {
  OpenMP openmp;
  std::set<std::string> found;
  dl_iterate_phdr(note, &found);
  if (found.size() != 1 || std::getenv("TIERFLOW_OWN_THREADS") != nullptr) return openmp;
  void* library = dlopen(found.begin()->c_str(), RTLD_NOW | RTLD_NOLOAD);  // never closed: its functions are kept
  if (library == nullptr) return openmp;
  look_up(library, "omp_get_max_threads", openmp.max_threads);
  look_up(library, "omp_in_parallel", openmp.in_parallel);
  look_up(library, "GOMP_parallel", openmp.parallel);
  return openmp.max_threads != nullptr && openmp.in_parallel != nullptr ? openmp : OpenMP{};
}

const pid_t kLoadedIn = getpid();

}  // namespace

bool run_on_team(void (*body)(void*), void* data, int threads) {
  static const OpenMP openmp = find();
  if (openmp.parallel == nullptr || getpid() != kLoadedIn || syscall(SYS_gettid) != kLoadedIn) return false;
  const int team = openmp.max_threads();
  if (team < 2 || team > threads || 2 * team < threads || openmp.in_parallel() != 0) return false;
  openmp.parallel(body, data, 0, 0);
  return true;
}

}  // namespace cpu_adam
