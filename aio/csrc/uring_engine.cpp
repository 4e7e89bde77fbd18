// io_uring. One thread owns the ring: it alone submits and reaps, so the ring needs no lock and the thread that asked
// for a transfer pays nothing for pinning pages and building requests.
#include "engine.hpp"
#include "faults.hpp"

#include <cerrno>
#include <system_error>

#ifndef TIERFLOW_HAVE_LIBURING

namespace tierflow::aio {

bool built_with_uring() noexcept { return false; }
int probe_uring() { return ENOSYS; }
EnginePtr make_uring_engine(FilePtr, unsigned, size_t, unsigned, unsigned) {
  throw std::system_error(ENOSYS, std::generic_category(), "built without liburing");
}

}  // namespace tierflow::aio

#else

#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <future>
#include <optional>
#include <thread>
#include <vector>

namespace tierflow::aio {

namespace {

// Newer than the oldest liburing headers worth building against; kernels that lack them answer EINVAL.
constexpr unsigned kCoopTaskrun = 1u << 8;
constexpr unsigned kSingleIssuer = 1u << 12;
constexpr unsigned kDeferTaskrun = 1u << 13;

constexpr uint64_t kWakeTag = ~uint64_t{1};  // ~0 is liburing's own
constexpr unsigned kSpareEntries = 2;        // the wake-up, and liburing's timer on kernels before 5.11

class Ring {
 public:
  ~Ring() { close(); }
  void close() {
    if (open_) io_uring_queue_exit(&ring_);
    open_ = false;
  }

  // 0 or an errno. Tries the cheapest way of running completions first.
  int open(unsigned entries) {
    int result = 0;
    for (const unsigned flags : {kSingleIssuer | kDeferTaskrun, kCoopTaskrun, 0u}) {
      io_uring_params params;
      std::memset(&params, 0, sizeof(params));
      params.flags = flags;
      result = io_uring_queue_init_params(entries, &ring_, &params);
      if (result != -EINVAL) break;
    }
    if (result < 0) return -result;
    open_ = true;
    io_uring_ring_dontfork(&ring_);
    return has_operations() ? 0 : EOPNOTSUPP;
  }

  io_uring* get() noexcept { return &ring_; }

 private:
  bool has_operations() {
    io_uring_probe* probe = io_uring_get_probe_ring(&ring_);
    if (probe == nullptr) return false;
    bool all = true;
    for (const int op : {IORING_OP_READ, IORING_OP_WRITE, IORING_OP_FSYNC}) {
      all = all && io_uring_opcode_supported(probe, op) != 0;
    }
    io_uring_free_probe(probe);
    return all;
  }

  io_uring ring_;
  bool open_ = false;
};

class EventFd {
 public:
  EventFd() : fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  }
  ~EventFd() { close(); }
  int get() const noexcept { return fd_; }
  void close() noexcept {
    const int fd = fd_.exchange(-1);
    if (fd >= 0) ::close(fd);
  }
  void signal() noexcept {
    const uint64_t one = 1;
    // Fails only when the counter is full, and then the reader is woken already.
    [[maybe_unused]] const ssize_t written = ::write(fd_, &one, sizeof(one));
  }
  void clear() noexcept {
    uint64_t count;
    [[maybe_unused]] const ssize_t taken = ::read(fd_, &count, sizeof(count));
  }

 private:
  std::atomic<int> fd_;
};

class UringEngine final : public Engine {
 public:
  UringEngine(FilePtr file, unsigned path, size_t block_size, unsigned queue_depth, unsigned rings)
      : Engine(std::move(file), path, block_size) {
    try {
      for (unsigned i = 0; i < rings; ++i) {
        const unsigned depth = queue_depth / rings + (i < queue_depth % rings ? 1 : 0);
        workers_.push_back(std::make_unique<Worker>(*this, std::max(depth, 1u)));
        workers_.back()->start();
      }
    } catch (...) {
      close();
      throw;
    }
  }
  ~UringEngine() override { close(); }

  void close() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
      wake();
    }
    std::lock_guard<std::mutex> lock(join_mutex_);
    for (const auto& worker : workers_) worker->join();
    std::lock_guard<std::mutex> no_more_signals(mutex_);
    for (const auto& worker : workers_) worker->deafen();
  }

  void abandon() noexcept override {
    for (const auto& worker : workers_) worker->abandon();
  }

 protected:
  void wake() override {
    for (const auto& worker : workers_) worker->signal();
  }

 private:
  // One ring and the thread that owns it.
  class Worker {
   public:
    Worker(UringEngine& engine, unsigned depth) : engine_(engine), slots_(depth) {
      for (unsigned i = 0; i < depth; ++i) free_slots_.push_back(depth - 1 - i);
    }

    // The ring is opened by the thread that will use it: a single-issuer ring belongs to its maker.
    void start() {
      std::promise<int> opened;
      thread_ = start_thread([this, &opened] {
        const int error = ring_.open(static_cast<unsigned>(slots_.size()) + kSpareEntries);
        if (error == 0) ring_fd_ = ring_.get()->ring_fd;
        opened.set_value(error);
        if (error == 0) run();
        ring_fd_ = -1;  // before the number is another file's, should a fork come now
        ring_.close();
      });
      const int error = opened.get_future().get();
      if (error == 0) return;
      thread_.join();
      throw std::system_error(error, std::generic_category(), "io_uring_setup");
    }

    void join() {
      if (thread_.joinable()) thread_.join();
    }

    void abandon() noexcept {
      const int fd = ring_fd_.exchange(-1);
      if (fd >= 0) ::close(fd);
      event_.close();
    }

    // With the engine's mutex held. One signal until the ring's thread has looked.
    void signal() {
      if (signalled_) return;
      signalled_ = true;
      event_.signal();
    }
    void deafen() { event_.close(); }

   private:
    void run() {
      listen();
      std::optional<Clock::time_point> due;
      while (fill(due)) {
        const int result = submit_and_wait(due);
        if (result < 0 && !passing(-result)) {
          fail_all(-result);
          return;
        }
        reap();
      }
    }

    // Blocks that wait for a pause to end are the backlog's: a timer ends the wait for them, and the ring goes on.
    int submit_and_wait(const std::optional<Clock::time_point>& due) {
      if (!due) return io_uring_submit_and_wait(ring_.get(), 1);
      const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(*due - Clock::now()).count();
      __kernel_timespec limit = timespec_of(std::max<long long>(left, 0));
      io_uring_cqe* first = nullptr;
      return io_uring_submit_and_wait_timeout(ring_.get(), &first, 1, &limit, nullptr);
    }

    // What io_uring_enter may answer without anything being wrong. It leaves the requests where they are, so the next
    // round submits them; what completes meanwhile is not kept waiting.
    bool passing(int error) {
      if (error == EINTR || error == ETIME) return true;
      if (error != EAGAIN && error != EBUSY && error != ENOMEM) return false;
      __kernel_timespec limit = timespec_of(1000000);
      io_uring_cqe* first = nullptr;
      io_uring_wait_cqe_timeout(ring_.get(), &first, &limit);
      return true;
    }

    static __kernel_timespec timespec_of(long long nanoseconds) {
      __kernel_timespec made;
      made.tv_sec = nanoseconds / 1000000000;
      made.tv_nsec = nanoseconds % 1000000000;
      return made;
    }

    // A poll and no read, for it leaves no buffer with the kernel when the ring is torn down.
    void listen() {
      io_uring_sqe* sqe = io_uring_get_sqe(ring_.get());
      io_uring_prep_poll_add(sqe, event_.get(), POLLIN);
      sqe->user_data = kWakeTag;
    }

    // Moves blocks from the backlog to the ring. False: closed, and nothing is left to do. `due`: when a block's pause
    // ends for which there is room.
    bool fill(std::optional<Clock::time_point>& due) {
      std::unique_lock<std::mutex> lock(engine_.mutex_);
      while (!free_slots_.empty()) {
        const unsigned slot = free_slots_.back();
        if (!engine_.take(lock, slots_[slot])) break;
        lock.unlock();
        if (engine_.begin(slots_[slot])) {
          free_slots_.pop_back();
          issue(slot);
        }
        lock.lock();
      }
      due = free_slots_.empty() ? std::nullopt : engine_.backlog_.next_due();
      return !(engine_.closing_ && free_slots_.size() == slots_.size() && engine_.backlog_.idle());
    }

    void issue(unsigned slot) {
      prepare(slot);
      // Copying and checksumming the next block takes long enough for the device to idle.
      if (slots_[slot].bounced || engine_.file_->checksums()) io_uring_submit(ring_.get());
    }

    // The ring has an entry for each slot, and spare ones: io_uring_get_sqe cannot come back empty.
    void prepare(unsigned slot) {
      Block& block = slots_[slot];
      const File& file = *engine_.file_;
      io_uring_sqe* sqe = io_uring_get_sqe(ring_.get());
      const auto length = static_cast<unsigned>(kernel_length(block, file));
      switch (block.next) {
        case Op::Read: io_uring_prep_read(sqe, file.fd(), block.data, length, block.offset); break;
        case Op::Write: io_uring_prep_write(sqe, file.fd(), block.data, length, block.offset); break;
        case Op::Sync: io_uring_prep_fsync(sqe, file.fd(), IORING_FSYNC_DATASYNC); break;
      }
      // Through the page cache a request is a copy: left inline, all of them would run in this one thread.
      if (!file.direct()) sqe->flags |= IOSQE_ASYNC;
      sqe->user_data = slot;
    }

    void reap() {
      io_uring_cqe* cqe = nullptr;
      while (io_uring_peek_cqe(ring_.get(), &cqe) == 0) {
        const uint64_t tag = cqe->user_data;
        const int result = cqe->res;
        io_uring_cqe_seen(ring_.get(), cqe);
        if (tag == kWakeTag) {
          heard();
        } else if (engine_.complete(slots_[tag], result)) {
          prepare(static_cast<unsigned>(tag));
        } else {
          free_slots_.push_back(static_cast<unsigned>(tag));
        }
      }
    }

    // [Note: no lost wake-up] The flag falls before fill() looks at the backlog, and both hold the mutex: a ticket
    // pushed before is seen by that fill(), one pushed after finds the flag down and signals.
    void heard() {
      {
        std::lock_guard<std::mutex> lock(engine_.mutex_);
        event_.clear();
        signalled_ = false;
      }
      listen();
    }

    // The ring itself is lost (its descriptor closed by someone, say). Nobody may wait for it forever, and nobody can
    // tell when the kernel is through with the memory of what was out.
    void fail_all(int error) {
      std::vector<bool> unused(slots_.size(), false);
      for (const unsigned slot : free_slots_) unused[slot] = true;
      for (size_t slot = 0; slot < slots_.size(); ++slot) {
        if (unused[slot]) continue;
        Block& block = slots_[slot];
        block.ticket->orphan();
        (void)block.bounce.release();
        engine_.retire(block, block.failed_with(error, engine_.path_));
      }
      Block block;
      std::unique_lock<std::mutex> lock(engine_.mutex_);
      engine_.closing_ = true;
      while (engine_.take(lock, block, true)) {
        lock.unlock();
        engine_.retire(block, block.failed_with(error, engine_.path_));
        lock.lock();
      }
    }

    UringEngine& engine_;
    EventFd event_;
    bool signalled_ = false;  // guarded by the engine's mutex
    Ring ring_;               // the thread alone, like the slots
    std::vector<Block> slots_;
    std::vector<unsigned> free_slots_;
    std::atomic<int> ring_fd_{-1};
    std::thread thread_;
  };

  std::mutex join_mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

}  // namespace

bool built_with_uring() noexcept { return true; }

int probe_uring() {
  Ring ring;
  return ring.open(2);
}

EnginePtr make_uring_engine(FilePtr file, unsigned path, size_t block_size, unsigned queue_depth, unsigned rings) {
  return EnginePtr(new UringEngine(std::move(file), path, block_size, queue_depth, rings), LeakInChild{});
}

}  // namespace tierflow::aio

#endif
