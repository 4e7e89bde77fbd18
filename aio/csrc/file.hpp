// The file that transfers go to, and what the system says about it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "checksum.hpp"

namespace tierflow::aio {

// Sole owner of a file descriptor, and what a transfer to the file must keep to.
class File {
 public:
  // `alignment` of offsets and lengths and `memory_alignment` of addresses, in bytes; 1 where any will do. A nonzero
  // `checksummed` keeps checksums for that many bytes.
  File(int fd, uint64_t alignment, uint64_t memory_alignment, bool direct, uint64_t checksummed)
      : fd_(fd), alignment_(alignment), memory_alignment_(memory_alignment), direct_(direct) {
    if (checksummed > 0) checksums_.emplace(checksummed);
  }
  ~File() { close(); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int fd() const noexcept { return fd_.load(std::memory_order_relaxed); }
  uint64_t alignment() const noexcept { return alignment_; }
  uint64_t memory_alignment() const noexcept { return memory_alignment_; }
  bool direct() const noexcept { return direct_; }

  // What is transferred whole or not at all: a sector, or what has one checksum.
  uint64_t grain() const noexcept { return checksums_ ? std::max<uint64_t>(alignment_, kChecksumBytes) : alignment_; }
  Checksums* checksums() noexcept { return checksums_ ? &*checksums_ : nullptr; }

  // Takes no lock: a child after fork may call it while a thread of the parent held any.
  void close() noexcept;

 private:
  std::atomic<int> fd_;
  const uint64_t alignment_;
  const uint64_t memory_alignment_;
  const bool direct_;
  std::optional<Checksums> checksums_;
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
