// Carries out tickets. The base keeps the queue and the books; the two engines differ in how a block reaches the kernel.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "backlog.hpp"

namespace tierflow::aio {

class Engine {
 public:
  explicit Engine(size_t block_size) : backlog_(block_size) {}
  virtual ~Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // From any thread. Throws std::system_error(ESHUTDOWN) once close() has begun.
  void submit(TicketPtr ticket);

  // Waits for everything submitted, then stops the threads. May be called again, from any thread.
  virtual void close() = 0;

  // In a child after fork: gives up the descriptors it inherited. Takes no lock and ends no thread, for a thread of
  // the parent may have held any, and none of the parent's threads is here.
  virtual void abandon() noexcept {}

  uint64_t bytes_moved(Op op) const noexcept { return lanes_[index(op)].bytes.load(); }
  // Seconds during which at least one ticket of this direction was under way.
  double busy_seconds(Op op);

 protected:
  // Called with mutex_ held, after the backlog or closing_ changed.
  virtual void wake() = 0;

  // The one way by which a system call's result enters the books. True: issue the block's remainder.
  // Call without mutex_.
  bool complete(Block& block, long result);

  std::mutex mutex_;
  Backlog backlog_;       // guarded by mutex_
  bool closing_ = false;  // guarded by mutex_

 private:
  struct Lane {
    std::atomic<uint64_t> bytes{0};
    uint64_t tickets = 0;        // under way; guarded by mutex_, like the rest
    Clock::time_point since;     // when `tickets` last rose from 0
    Clock::duration busy{0};
  };

  static size_t index(Op op) noexcept { return static_cast<size_t>(op); }
  void end(const TicketPtr& ticket);

  Lane lanes_[2];
};

using EnginePtr = std::shared_ptr<Engine>;

// Starts a thread that no signal is delivered to: handlers belong to the program's own threads.
std::thread start_thread(std::function<void()> body);

EnginePtr make_thread_engine(size_t block_size, unsigned threads);

// Throws std::system_error with io_uring_setup's errno; ENOSYS as well where this build has no liburing.
EnginePtr make_uring_engine(size_t block_size, unsigned queue_depth);

// 0 where make_uring_engine would work, else the errno; EOPNOTSUPP: a ring can be had but not the operations needed.
int probe_uring();
bool built_with_uring() noexcept;

}  // namespace tierflow::aio
