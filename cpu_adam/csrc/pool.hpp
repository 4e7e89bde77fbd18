// A small persistent pool of threads that serves one loop at a time.
//
// [Note: nodes] On a machine with several NUMA nodes each worker is bound to the processors of one, and a loop's indices
// are cut into one run for each node, in the same places for the same count; a thread takes from its own node's run
// first and helps others after. So what is first written by these kernels lies on the node that goes on working on it.
// A worker is never bound to one processor: the caller roams, and a worker bound to where the caller is would wait
// behind it while another processor idles.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <vector>

namespace cpu_adam {

using Task = void (*)(void* context, std::size_t index);

class Pool {
 public:
  Pool();

  // The pool of this process. After a fork the child gets a new one: its parent's threads are not there, and the
  // parent's locks may be held by them.
  static Pool& get();

  // Calls task(context, i) for each i below `count`, on the caller and at most threads - 1 workers. A call that finds
  // the pool busy with another thread's loop does its work on its own thread instead of waiting.
  void run(Task task, void* context, std::size_t count, int threads);

 private:
  // Indices [next, end) of a node, alone in its cache line.
  struct alignas(64) Run {
    std::atomic<std::size_t> next{0};
    std::size_t end = 0;
  };
  struct Job {
    Task task;
    void* context;
    std::vector<Run> runs;
    void work(std::size_t node) {
      for (std::size_t k = 0; k < runs.size(); ++k) {
        Run& run = runs[(node + k) % runs.size()];
        for (std::size_t i; (i = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end;) task(context, i);
      }
    }
  };

  std::vector<Run> cut(std::size_t count) const;
  std::size_t caller_node() const;
  void grow(int workers);
  void worker(std::size_t node);
  void finish();

  const std::vector<std::vector<int>> nodes_;  // at least one
  std::mutex running_;  // held by the caller of run()
  std::mutex mutex_;    // guards what follows
  std::condition_variable wake_;
  std::condition_variable idle_;
  Job* job_ = nullptr;
  int seats_ = 0;  // workers that may still join the job
  int workers_ = 0;
  std::atomic<int> active_{0};             // changed under mutex_
  std::atomic<unsigned> generation_{0};    // changed under mutex_; workers spin on it for a moment
};

}  // namespace cpu_adam
