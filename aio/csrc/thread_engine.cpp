// pread and pwrite on a pool of threads, for where io_uring is refused.
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <vector>

#include "engine.hpp"

namespace tierflow::aio {

namespace {

class ThreadEngine final : public Engine {
 public:
  ThreadEngine(size_t block_size, unsigned threads) : Engine(block_size) {
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
  void wake() override { ready_.notify_one(); }

 private:
  bool next(Block& block) {
    std::unique_lock<std::mutex> lock(mutex_);
    ready_.wait(lock, [this] { return closing_ || !backlog_.empty(); });
    const bool taken = backlog_.pop(block);
    if (taken && !backlog_.empty()) ready_.notify_one();
    return taken;
  }

  static long issue(const Block& block) {
    const int fd = block.ticket->file->fd();
    const auto offset = static_cast<off_t>(block.offset);
    const ssize_t result = block.ticket->op == Op::Read ? ::pread(fd, block.data, block.left, offset)
                                                        : ::pwrite(fd, block.data, block.left, offset);
    return result < 0 ? -static_cast<long>(errno) : static_cast<long>(result);
  }

  void run() {
    Block block;
    while (next(block)) {
      while (complete(block, issue(block))) {
      }
    }
  }

  std::condition_variable ready_;
  std::mutex join_mutex_;
  std::vector<std::thread> workers_;
};

}  // namespace

EnginePtr make_thread_engine(size_t block_size, unsigned threads) {
  return EnginePtr(new ThreadEngine(block_size, threads), LeakInChild{});
}

}  // namespace tierflow::aio
