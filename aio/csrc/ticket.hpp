// A transfer under way: which bytes go where, how much is still out, and how it ended.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>

#include "file.hpp"

namespace tierflow::aio {

using Clock = std::chrono::steady_clock;

enum class Op : uint8_t { Read = 0, Write = 1 };

// Recorded in place of an errno when a read finds the file's end inside the range it was asked for.
constexpr int kEndOfFile = -1;

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
  int error = 0;  // errno, kEndOfFile, or 0 for none
  uint64_t offset = 0;
  uint64_t length = 0;  // of the part that failed
};

class Ticket {
 public:
  Ticket(Op op, std::shared_ptr<File> file, char* data, uint64_t offset, uint64_t length)
      : op(op), file(std::move(file)), data(data), offset(offset), length(length) {}

  const Op op;
  const std::shared_ptr<File> file;
  char* const data;
  const uint64_t offset;
  const uint64_t length;

  // For the engine, before any block is issued.
  void start(uint64_t blocks) {
    blocks_left_ = blocks;
    started_ = Clock::now();
  }

  // For the engine: the first block goes to the kernel. Until then the ticket only waits its turn.
  void begin() noexcept { began_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed); }

  // For the engine: one block is back. The first failure is the ticket's. True for the last block, after which the
  // engine does its books and calls finish().
  bool block_done(const Failure& failure) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (failure.error != 0 && failure_.error == 0) failure_ = failure;
    return --blocks_left_ == 0;
  }

  void finish() {
    std::lock_guard<std::mutex> lock(mutex_);
    ended_ = Clock::now();
    done_.store(true, std::memory_order_release);
    finished_.notify_all();
  }

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

  std::mutex mutex_;
  std::condition_variable finished_;
  uint64_t blocks_left_ = 0;
  Failure failure_;
  Clock::time_point started_, ended_;
  std::atomic<Clock::rep> began_{kNever};
  std::atomic<bool> done_{false};
};

using TicketPtr = std::shared_ptr<Ticket>;

}  // namespace tierflow::aio
