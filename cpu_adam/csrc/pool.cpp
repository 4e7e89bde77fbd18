#include "pool.hpp"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <system_error>
#include <thread>

namespace cpu_adam {
namespace {

// Long enough to bridge the gap between two calls in a row, short enough to cost nobody their core.
constexpr std::chrono::microseconds kSpin{20};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

template <typename Done>
bool spin_until(Done done) {
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

// Signals are for the threads that Python knows.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

struct Owned {
  Pool pool;
  pid_t pid = getpid();
};

}  // namespace

Pool& Pool::get() {
  // Never freed: its threads sleep until the process ends, and a forked child cannot destroy what it inherited.
  static std::atomic<Owned*> current{nullptr};
  Owned* owned = current.load(std::memory_order_acquire);
  while (owned == nullptr || owned->pid != getpid()) {
    auto* fresh = new Owned;
    if (current.compare_exchange_strong(owned, fresh, std::memory_order_acq_rel)) return fresh->pool;
    delete fresh;
  }
  return owned->pool;
}

void Pool::run(Task task, void* context, std::size_t count, int threads) {
  Job job{task, context, count};
  std::unique_lock<std::mutex> running(running_, std::defer_lock);
  if (threads < 2 || count < 2 || !running.try_lock()) {
    job.work();
    return;
  }
  grow(threads - 1);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = &job;
    seats_ = threads - 1;
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  job.work();
  finish();
}

// After this no worker knows the job, whose memory is the caller's stack.
void Pool::finish() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = nullptr;
  }
  if (spin_until([this] { return active_.load(std::memory_order_acquire) == 0; })) return;
  std::unique_lock<std::mutex> lock(mutex_);
  idle_.wait(lock, [this] { return active_.load(std::memory_order_relaxed) == 0; });
}

void Pool::grow(int workers) {
  if (workers_ >= workers) return;
  SignalsBlocked blocked;
  try {
    for (; workers_ < workers; ++workers_) std::thread(&Pool::worker, this).detach();
  } catch (const std::system_error&) {
    // No more threads to be had: those that exist do the work.
  }
}

void Pool::worker() {
  unsigned seen = 0;
  for (;;) {
    spin_until([&] { return generation_.load(std::memory_order_acquire) != seen; });
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
    seen = generation_.load(std::memory_order_relaxed);
    if (job_ == nullptr || seats_ == 0) continue;
    --seats_;
    Job* job = job_;
    active_.fetch_add(1, std::memory_order_relaxed);
    lock.unlock();
    job->work();
    lock.lock();
    if (active_.fetch_sub(1, std::memory_order_release) == 1) idle_.notify_one();
  }
}

}  // namespace cpu_adam
