#include "pool.hpp"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <system_error>
#include <thread>

#include "topology.hpp"

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

std::vector<std::vector<int>> nodes_or_one() {
  auto nodes = numa_nodes(node_folder());
  if (nodes.empty()) nodes.emplace_back();
  return nodes;
}

// Refused, for instance by a container's rules, it costs only locality.
void bind(const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus) CPU_SET(cpu, &set);
  sched_setaffinity(0, sizeof set, &set);
}

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

Pool::Pool() : nodes_(nodes_or_one()) {}

// In shares that are as large as the nodes; see [Note: nodes].
std::vector<Pool::Run> Pool::cut(std::size_t count) const {
  std::size_t total = 0, before = 0;
  for (const auto& cpus : nodes_) total += cpus.size();
  std::vector<Run> runs(nodes_.size());
  for (std::size_t k = 0; k < nodes_.size(); ++k) {
    runs[k].next = total == 0 ? 0 : count * before / total;
    before += nodes_[k].size();
    runs[k].end = total == 0 ? count : count * before / total;
  }
  return runs;
}

std::size_t Pool::caller_node() const {
  if (nodes_.size() == 1) return 0;
  const int cpu = sched_getcpu();
  for (std::size_t k = 0; k < nodes_.size(); ++k)
    for (int other : nodes_[k])
      if (other == cpu) return k;
  return 0;
}

void Pool::run(Task task, void* context, std::size_t count, int threads) {
  std::unique_lock<std::mutex> running(running_, std::defer_lock);
  if (threads < 2 || count < 2 || !running.try_lock()) {
    for (std::size_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  Job job{task, context, cut(count)};
  grow(threads - 1);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = &job;
    seats_ = threads - 1;
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  job.work(caller_node());
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
    for (; workers_ < workers; ++workers_) std::thread(&Pool::worker, this, (workers_ + 1) % nodes_.size()).detach();
  } catch (const std::system_error&) {
    // No more threads to be had: those that exist do the work.
  }
}

void Pool::worker(std::size_t node) {
  if (nodes_.size() > 1) bind(nodes_[node]);
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
    job->work(node);
    lock.lock();
    if (active_.fetch_sub(1, std::memory_order_release) == 1) idle_.notify_one();
  }
}

}  // namespace cpu_adam
