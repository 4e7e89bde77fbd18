// pread and pwrite on a pool of threads, for where io_uring is refused.
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <vector>

#include "engine.hpp"
#include "faults.hpp"

namespace tierflow::aio {

namespace {

class ThreadEngine final : public Engine {
 public:
  ThreadEngine(FilePtr file, unsigned path, size_t block_size, unsigned threads)
      : Engine(std::move(file), path, block_size) {
    try {
      for (unsigned i = 0; i < threads; ++i) workers_.push_back(start_thread([this] { run(); }));
    } catch (...) {
      close();
      throw;
    }
  }
  ~ThreadEngine() override { close(); }

  void close() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
      ready_.notify_all();
    }
    std::lock_guard<std::mutex> lock(join_mutex_);
    for (std::thread& worker : workers_) {
      if (worker.joinable()) worker.join();
    }
  }

 protected:
  // A ticket may be many blocks: each worker that takes one wakes the next.
  void wake() override {
    if (closing_) {
      ready_.notify_all();
    } else {
      ready_.notify_one();
    }
  }

 private:
  bool next(Block& block) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (take(lock, block)) {
        if (backlog_.has_work()) ready_.notify_one();
        return true;
      }
      if (closing_ && backlog_.idle()) return false;
      if (const auto due = backlog_.next_due()) {
        ready_.wait_until(lock, *due);
      } else {
        ready_.wait(lock);
      }
    }
  }

  long issue(Block& block) const {
    const int fd = file_->fd();
    const auto offset = static_cast<off_t>(block.offset);
    const size_t length = kernel_length(block, *file_);
    ssize_t result = 0;
    switch (block.next) {
      case Op::Read: result = ::pread(fd, block.data, length, offset); break;
      case Op::Write: result = ::pwrite(fd, block.data, length, offset); break;
      case Op::Sync: result = ::fdatasync(fd); break;
    }
    return result < 0 ? -static_cast<long>(errno) : static_cast<long>(result);
  }

  void run() {
    Block block;
    while (next(block)) {
      if (!begin(block)) continue;
      while (complete(block, issue(block))) {
      }
    }
  }

  std::condition_variable ready_;
  std::mutex join_mutex_;
  std::vector<std::thread> workers_;
};

}  // namespace

EnginePtr make_thread_engine(FilePtr file, unsigned path, size_t block_size, unsigned threads) {
  return EnginePtr(new ThreadEngine(std::move(file), path, block_size, threads), LeakInChild{});
}

}  // namespace tierflow::aio
