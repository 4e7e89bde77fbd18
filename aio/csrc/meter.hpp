// For how long a store was busy, by direction.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace tierflow::aio {

using Clock = std::chrono::steady_clock;

enum class Op : uint8_t { Read = 0, Write = 1, Sync = 2 };

inline size_t index(Op op) noexcept { return static_cast<size_t>(op); }

class Meter {
 public:
  void begin(Op op) {
    std::lock_guard<std::mutex> lock(mutex_);
    Side& side = sides_[index(op)];
    if (side.tickets++ == 0) side.since = Clock::now();
  }
  void end(Op op) {
    std::lock_guard<std::mutex> lock(mutex_);
    Side& side = sides_[index(op)];
    if (--side.tickets == 0) side.busy += Clock::now() - side.since;
  }
  // Seconds during which at least one ticket of this direction was under way.
  double busy_seconds(Op op) {
    std::lock_guard<std::mutex> lock(mutex_);
    const Side& side = sides_[index(op)];
    Clock::duration busy = side.busy;
    if (side.tickets > 0) busy += Clock::now() - side.since;
    return std::chrono::duration<double>(busy).count();
  }

 private:
  struct Side {
    uint64_t tickets = 0;     // under way
    Clock::time_point since;  // when `tickets` last rose from 0
    Clock::duration busy{0};
  };
  std::mutex mutex_;
  Side sides_[3];
};

}  // namespace tierflow::aio
