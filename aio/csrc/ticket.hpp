// A transfer under way, however many requests, paths and blocks it is: how much is still out, and how it ended.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "meter.hpp"

namespace tierflow::aio {

// Recorded in place of an errno: a read found the file's end inside the range it was asked for; bytes came back that
// are not those that were written.
constexpr int kEndOfFile = -1;
constexpr int kCorrupt = -2;

// In a child after fork the threads that hold an object's locks do not exist, and destroying a condition variable
// that one of them waits on would hang. So only the process that made an object destroys it.
struct LeakInChild {
  pid_t owner = ::getpid();
  template <class T>
  void operator()(T* object) const {
    if (::getpid() == owner) delete object;
  }
};

struct Failure {
  int error = 0;  // errno, kEndOfFile, kCorrupt, or 0 for none
  uint64_t offset = 0;  // in the store
  uint64_t length = 0;  // of the part that failed
  unsigned path = 0;
};

class Ticket {
 public:
  Ticket(Op op, std::shared_ptr<Meter> meter) : op(op), meter_(std::move(meter)) {}

  const Op op;

  // Before any block is issued.
  void start(uint64_t blocks) {
    blocks_left_ = blocks;
    started_ = Clock::now();
    meter_->begin(op);
  }

  // A block goes to the kernel. Until the first one does the ticket only waits its turn.
  void begin() noexcept {
    if (began_.load(std::memory_order_relaxed) != kNever) return;
    Clock::rep never = kNever;
    began_.compare_exchange_strong(never, Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  }

  // Once a block has failed, those not yet issued are not worth issuing.
  bool failed() const noexcept { return failed_.load(std::memory_order_relaxed); }

  // A block is back. The first failure is the ticket's; the last block ends it, the books before whoever waits.
  void block_done(const Failure& failure) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (failure.error != 0 && failure_.error == 0) {
        failure_ = failure;
        failed_.store(true, std::memory_order_relaxed);
      }
      if (--blocks_left_ != 0) return;
    }
    meter_->end(op);
    std::lock_guard<std::mutex> lock(mutex_);
    ended_ = Clock::now();
    done_.store(true, std::memory_order_release);
    finished_.notify_all();
  }

  // The kernel may go on writing to the memory although the ticket ends: the ring that could tell is lost.
  void orphan() noexcept { orphaned_.store(true, std::memory_order_relaxed); }
  bool orphaned() const noexcept { return orphaned_.load(std::memory_order_relaxed); }

  bool done() const noexcept { return done_.load(std::memory_order_acquire); }

  // False when the time is over first.
  bool wait_for(std::chrono::milliseconds limit) {
    if (done()) return true;
    std::unique_lock<std::mutex> lock(mutex_);
    return finished_.wait_for(lock, limit, [this] { return done(); });
  }

  // Of a ticket that is done.
  const Failure& failure() const noexcept { return failure_; }
  double seconds() const noexcept {
    return done() ? std::chrono::duration<double>(ended_ - started_).count() : 0.0;
  }

  // On the steady clock, which on Linux is CLOCK_MONOTONIC and so Python's time.perf_counter(); none before the event.
  std::optional<double> began() const noexcept {
    const Clock::rep count = began_.load(std::memory_order_relaxed);
    return count == kNever ? std::nullopt : std::optional<double>(since_epoch(Clock::duration(count)));
  }
  std::optional<double> ended() const noexcept {
    return done() ? std::optional<double>(since_epoch(ended_.time_since_epoch())) : std::nullopt;
  }

 private:
  static constexpr Clock::rep kNever = -1;
  static double since_epoch(Clock::duration time) noexcept { return std::chrono::duration<double>(time).count(); }

  const std::shared_ptr<Meter> meter_;
  std::mutex mutex_;
  std::condition_variable finished_;
  uint64_t blocks_left_ = 0;
  Failure failure_;
  Clock::time_point started_, ended_;
  std::atomic<Clock::rep> began_{kNever};
  std::atomic<bool> failed_{false};
  std::atomic<bool> orphaned_{false};
  std::atomic<bool> done_{false};
};

using TicketPtr = std::shared_ptr<Ticket>;

}  // namespace tierflow::aio
