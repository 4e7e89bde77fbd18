// Streams that are threads, and events in them.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace emulated {

using Clock = std::chrono::steady_clock;

// What happens once: threads wait for it.
class Moment {
 public:
  void come() {
    const std::lock_guard<std::mutex> lock(mutex_);
    at_ = Clock::now();
    come_ = true;
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return come_; });
  }
  bool has_come() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return come_;
  }
  Clock::time_point at() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return at_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool come_ = false;
  Clock::time_point at_;
};

// Runs what it is given in order, in a thread of its own, each after a lag: who does not wait for it sees old bytes.
class Queue {
 public:
  Queue() { std::thread([this] { work(); }).detach(); }

  void submit(std::function<void()> task, int lag_us = 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back({std::move(task), lag_us});
    ++pending_;
    changed_.notify_all();
  }
  std::shared_ptr<Moment> mark() {
    auto moment = std::make_shared<Moment>();
    submit([moment] { moment->come(); });
    return moment;
  }
  void drain() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (pending_ == 0) return;
    lock.unlock();
    mark()->wait();
  }
  bool idle() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return pending_ == 0;
  }

 private:
  struct Task {
    std::function<void()> run;
    int lag_us;
  };

  void work() {
    for (;;) {
      Task task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return !tasks_.empty(); });
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      if (task.lag_us) std::this_thread::sleep_for(std::chrono::microseconds(task.lag_us));
      task.run();
      task.run = nullptr;
      const std::lock_guard<std::mutex> lock(mutex_);
      --pending_;
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  std::size_t pending_ = 0;
};

// All streams of the device, by id; 0 is the default stream. They live as long as the process, as threads wait in them.
class Streams {
 public:
  static Streams& all() {
    static auto* const streams = new Streams;
    return *streams;
  }
  std::int64_t make() {
    const std::lock_guard<std::mutex> lock(mutex_);
    queues_.push_back(std::make_unique<Queue>());
    return static_cast<std::int64_t>(queues_.size()) - 1;
  }
  Queue& queue(std::int64_t id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return *queues_.at(static_cast<std::size_t>(id));
  }
  void drain() {
    std::size_t count = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      count = queues_.size();
    }
    for (std::size_t id = 0; id < count; ++id) queue(static_cast<std::int64_t>(id)).drain();
  }

 private:
  Streams() { queues_.push_back(std::make_unique<Queue>()); }
  std::mutex mutex_;
  std::vector<std::unique_ptr<Queue>> queues_;
};

inline std::int64_t& current() {
  thread_local std::int64_t id = 0;
  return id;
}

inline Queue& current_queue() { return Streams::all().queue(current()); }

// How long copies and operators take on the average: most of them next to nothing, one in sixteen long.
constexpr int copy_lag_us = 100, compute_lag_us = 50;

inline int lag(int average_us) {
  static std::atomic<std::uint32_t> count{0};
  const std::uint32_t mixed = count++ * 2654435761u;  // Knuth's multiplier: no pattern that a loop could follow
  return mixed >> 28 == 0 ? 16 * average_us : 0;
}

}  // namespace emulated
