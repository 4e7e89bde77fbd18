// Carries out what goes to one path. The base keeps the queue and the books; the two engines differ in how a block
// reaches the kernel.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "backlog.hpp"

namespace tierflow::aio {

using FilePtr = std::shared_ptr<File>;

class Engine {
 public:
  // `path` is the number by which failures name it.
  Engine(FilePtr file, unsigned path, size_t block_size)
      : file_(std::move(file)), path_(path), backlog_(block_size, file_->grain()) {}
  virtual ~Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const File& file() const noexcept { return *file_; }
  uint64_t blocks_of(uint64_t length) const { return backlog_.blocks_of(length); }

  // From any thread. False, and nothing taken, once close() has begun or the ring is lost.
  bool submit(std::vector<Segment> segments);
  bool closing();

  // Waits for everything submitted, then stops the threads. May be called again, from any thread.
  virtual void close() = 0;

  // In a child after fork: gives up the descriptors it inherited. Takes no lock and ends no thread, for a thread of
  // the parent may have held any, and none of the parent's threads is here.
  virtual void abandon() noexcept {}

  // Of the callers' bytes.
  uint64_t bytes_moved(Op op) const noexcept { return bytes_[index(op)].load(); }
  uint64_t bytes_bounced() const noexcept { return bounced_.load(); }

 protected:
  // Called with mutex_ held, after the backlog or closing_ changed.
  virtual void wake() = 0;

  // The next block that is worth issuing, if any. `lock` is on mutex_ and is let go meanwhile for those that are not.
  bool take(std::unique_lock<std::mutex>& lock, Block& out, bool even_early = false);

  // Call the rest without mutex_. False: the block is over already.
  bool begin(Block& block);
  // The one way by which a system call's result enters the books. True: issue what is left of the block.
  bool complete(Block& block, long result);
  void retire(Block& block, const Failure& failure);

  const FilePtr file_;
  const unsigned path_;
  std::mutex mutex_;
  Backlog backlog_;       // guarded by mutex_
  bool closing_ = false;  // guarded by mutex_

 private:
  void moved(const Block& block, size_t nbytes) noexcept { bytes_[index(block.ticket->op)] += nbytes; }
  bool later(Block& block);

  std::atomic<uint64_t> bytes_[3]{};
  std::atomic<uint64_t> bounced_{0};
};

using EnginePtr = std::shared_ptr<Engine>;

// Starts a thread that no signal is delivered to: handlers belong to the program's own threads.
std::thread start_thread(std::function<void()> body);

EnginePtr make_thread_engine(FilePtr file, unsigned path, size_t block_size, unsigned threads);

// `queue_depth` blocks in flight in all, spread over `rings`. Throws std::system_error with io_uring_setup's errno;
// ENOSYS as well where this build has no liburing.
EnginePtr make_uring_engine(FilePtr file, unsigned path, size_t block_size, unsigned queue_depth, unsigned rings);

// 0 where make_uring_engine would work, else the errno; EOPNOTSUPP: a ring can be had but not the operations needed.
int probe_uring();
bool built_with_uring() noexcept;

}  // namespace tierflow::aio
