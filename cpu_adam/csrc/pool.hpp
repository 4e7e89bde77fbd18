// A small persistent pool of threads that serves one loop at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>

namespace cpu_adam {

using Task = void (*)(void* context, std::size_t index);

class Pool {
 public:
  // The pool of this process. After a fork the child gets a new one: its parent's threads are not there, and the
  // parent's locks may be held by them.
  static Pool& get();

  // Calls task(context, i) for each i below `count`, on the caller and at most threads - 1 workers. A call that finds
  // the pool busy with another thread's loop does its work on its own thread instead of waiting.
  void run(Task task, void* context, std::size_t count, int threads);

 private:
  struct Job {
    Task task;
    void* context;
    std::size_t count;
    std::atomic<std::size_t> next{0};
    void work() {
      for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i);
    }
  };

  void grow(int workers);
  void worker();
  void finish();

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
