// torch's own threads.
//
// [Note: torch's threads] OpenMP's threads go on spinning for a while after a parallel region, waiting for the next one. A
// loop that follows torch's at once on threads of its own would share the processors with those that spin. So the thread
// that torch's operators run on in a plain loop, the process's first, gives its loops to the same team.
#pragma once

namespace cpu_adam {

// Calls body(data) on every thread of OpenMP's team and returns true. Returns false, with nothing called, where there is
// no such team, where it has more than `threads` threads, in another thread than the process's first, in a forked child
// (whose team is gone), inside a parallel region, and where TIERFLOW_OWN_THREADS is set.
bool run_on_team(void (*body)(void*), void* data, int threads);

}  // namespace cpu_adam
