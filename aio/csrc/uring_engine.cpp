// io_uring. One thread owns the ring: it alone submits and reaps, so the ring needs no lock and the thread that asked
// for a transfer pays nothing for pinning pages and building requests.
#include "engine.hpp"

#include <cerrno>
#include <system_error>

#ifndef TIERFLOW_HAVE_LIBURING

namespace tierflow::aio {

bool built_with_uring() noexcept { return false; }
int probe_uring() { return ENOSYS; }
EnginePtr make_uring_engine(size_t, unsigned) {
  throw std::system_error(ENOSYS, std::generic_category(), "built without liburing");
}

}  // namespace tierflow::aio

#else

#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <future>
#include <thread>
#include <vector>

namespace tierflow::aio {

namespace {

// Newer than the oldest liburing headers worth building against; kernels that lack them answer EINVAL.
constexpr unsigned kCoopTaskrun = 1u << 8;
constexpr unsigned kSingleIssuer = 1u << 12;
constexpr unsigned kDeferTaskrun = 1u << 13;

constexpr uint64_t kWakeTag = ~uint64_t{0};

class Ring {
 public:
  ~Ring() {
    if (open_) io_uring_queue_exit(&ring_);
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
    const bool both = io_uring_opcode_supported(probe, IORING_OP_READ) &&
                      io_uring_opcode_supported(probe, IORING_OP_WRITE);
    io_uring_free_probe(probe);
    return both;
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
  UringEngine(size_t block_size, unsigned queue_depth) : Engine(block_size), slots_(queue_depth) {
    for (unsigned i = 0; i < queue_depth; ++i) free_slots_.push_back(queue_depth - 1 - i);
    std::promise<int> opened;
    // The ring is opened by the thread that will use it: a single-issuer ring belongs to its maker.
    thread_ = start_thread([this, &opened] {
      Ring ring;
      const int error = ring.open(static_cast<unsigned>(slots_.size()) + 1);
      if (error == 0) ring_fd_ = ring.get()->ring_fd;
      opened.set_value(error);
      if (error == 0) run(ring.get());
      ring_fd_ = -1;  // before the number is another file's, should a fork come now
    });
    const int error = opened.get_future().get();
    if (error != 0) {
      thread_.join();
      throw std::system_error(error, std::generic_category(), "io_uring_setup");
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
    if (thread_.joinable()) thread_.join();
    std::lock_guard<std::mutex> no_more_signals(mutex_);
    event_.close();
  }

  void abandon() noexcept override {
    const int fd = ring_fd_.exchange(-1);
    if (fd >= 0) ::close(fd);
    event_.close();
  }

 protected:
  // One signal until the ring's thread has looked.
  void wake() override {
    if (signalled_) return;
    signalled_ = true;
    event_.signal();
  }

 private:
  void run(io_uring* ring) {
    listen(ring);
    while (fill(ring)) {
      const int result = io_uring_submit_and_wait(ring, 1);
      if (result < 0 && !passing(-result)) {
        fail_all(-result);
        return;
      }
      reap(ring);
    }
  }

  // What io_uring_enter may answer without anything being wrong. It leaves the requests where they are, so the next
  // round submits them.
  static bool passing(int error) {
    if (error == EINTR) return true;
    if (error != EAGAIN && error != EBUSY && error != ENOMEM) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return true;
  }

  // A poll and no read, for it leaves no buffer with the kernel when the ring is torn down.
  void listen(io_uring* ring) {
    io_uring_sqe* sqe = io_uring_get_sqe(ring);
    io_uring_prep_poll_add(sqe, event_.get(), POLLIN);
    sqe->user_data = kWakeTag;
  }

  // Moves blocks from the backlog to the ring. False: closed, and nothing is left to do.
  bool fill(io_uring* ring) {
    std::lock_guard<std::mutex> lock(mutex_);
    while (!free_slots_.empty()) {
      const unsigned slot = free_slots_.back();
      if (!backlog_.pop(slots_[slot])) break;
      free_slots_.pop_back();
      prepare(ring, slot);
    }
    return !(closing_ && free_slots_.size() == slots_.size());
  }

  // The ring has an entry for each slot and one for the wake-up, so that io_uring_get_sqe cannot come back empty.
  void prepare(io_uring* ring, unsigned slot) {
    const Block& block = slots_[slot];
    const File& file = *block.ticket->file;
    io_uring_sqe* sqe = io_uring_get_sqe(ring);
    const auto length = static_cast<unsigned>(block.left);
    if (block.ticket->op == Op::Read) {
      io_uring_prep_read(sqe, file.fd(), block.data, length, block.offset);
    } else {
      io_uring_prep_write(sqe, file.fd(), block.data, length, block.offset);
    }
    // Through the page cache a request is a copy: left inline, all of them would run in this one thread.
    if (!file.direct()) sqe->flags |= IOSQE_ASYNC;
    sqe->user_data = slot;
  }

  void reap(io_uring* ring) {
    io_uring_cqe* cqe = nullptr;
    while (io_uring_peek_cqe(ring, &cqe) == 0) {
      const uint64_t tag = cqe->user_data;
      const int result = cqe->res;
      io_uring_cqe_seen(ring, cqe);
      if (tag == kWakeTag) {
        heard(ring);
      } else if (complete(slots_[tag], result)) {
        prepare(ring, static_cast<unsigned>(tag));
      } else {
        free_slots_.push_back(static_cast<unsigned>(tag));
      }
    }
  }

  // [Note: no lost wake-up] The flag falls before fill() looks at the backlog, and both hold the mutex: a ticket
  // pushed before is seen by that fill(), one pushed after finds the flag down and signals.
  void heard(io_uring* ring) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      event_.clear();
      signalled_ = false;
    }
    listen(ring);
  }

  // The ring itself is lost (its descriptor closed by someone, say). Nobody may wait for it forever.
  void fail_all(int error) {
    std::vector<bool> unused(slots_.size(), false);
    for (const unsigned slot : free_slots_) unused[slot] = true;
    for (size_t slot = 0; slot < slots_.size(); ++slot) {
      if (!unused[slot]) complete(slots_[slot], -error);
    }
    Block block;
    for (;;) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        closing_ = true;
        if (!backlog_.pop(block)) return;
      }
      complete(block, -error);
    }
  }

  EventFd event_;
  bool signalled_ = false;  // guarded by mutex_
  std::atomic<int> ring_fd_{-1};
  std::vector<Block> slots_;          // what the kernel has; the ring's thread alone
  std::vector<unsigned> free_slots_;  // likewise
  std::mutex join_mutex_;
  std::thread thread_;
};

}  // namespace

bool built_with_uring() noexcept { return true; }

int probe_uring() {
  Ring ring;
  return ring.open(2);
}

EnginePtr make_uring_engine(size_t block_size, unsigned queue_depth) {
  return EnginePtr(new UringEngine(block_size, queue_depth), LeakInChild{});
}

}  // namespace tierflow::aio

#endif
