// The file that transfers go to, and what the system says about it.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

namespace tierflow::aio {

// Sole owner of a file descriptor. Tickets share it, so it outlives every transfer that names it.
class File {
 public:
  File(int fd, uint64_t alignment, bool direct) : fd_(fd), alignment_(alignment), direct_(direct) {}
  ~File() { close(); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int fd() const noexcept { return fd_.load(std::memory_order_relaxed); }
  uint64_t alignment() const noexcept { return alignment_; }
  bool direct() const noexcept { return direct_; }

  // Takes no lock: a child after fork may call it while a thread of the parent held any.
  void close() noexcept;

 private:
  std::atomic<int> fd_;
  const uint64_t alignment_;
  const bool direct_;
};

struct DirectAlignment {
  uint32_t memory;  // bytes; 0 where the file cannot be opened with O_DIRECT
  uint32_t offset;
};

// STATX_DIOALIGN of an open file; nothing where the kernel or the file system does not answer it.
std::optional<DirectAlignment> direct_alignment(int fd);

// f_type of fstatfs(2). Throws std::system_error.
uint64_t filesystem_magic(int fd);

// Reserves `nbytes` on disk and makes the file that long. Throws std::system_error, EOPNOTSUPP where the file system
// cannot. Not posix_fallocate: the C library would answer that by writing into every block.
void reserve(int fd, uint64_t nbytes);

}  // namespace tierflow::aio
