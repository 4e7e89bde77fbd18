// What is issued as one system call, and what has to be done to its bytes before and after.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "file.hpp"
#include "ticket.hpp"

namespace tierflow::aio {

// A contiguous part of one ticket on one path; cut into blocks as it is issued.
struct Segment {
  TicketPtr ticket;
  char* data = nullptr;
  uint64_t offset = 0;  // in the file
  uint64_t length = 0;  // 0 for a Sync
  uint64_t store_offset = 0;
  bool bounced = false;  // through aligned memory: the caller's is not
  bool edge = false;     // less than a grain: a write has to read the rest of it first
  bool urgent = false;
};

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

struct Block {
  TicketPtr ticket;

  // What the kernel is still to do; shrinks from the front as bytes are moved.
  Op next = Op::Read;
  char* data = nullptr;
  uint64_t offset = 0;
  size_t left = 0;

  // What the caller asked for.
  char* user = nullptr;
  uint64_t user_offset = 0;
  size_t user_length = 0;
  uint64_t store_offset = 0;  // of the caller's first byte

  bool bounced = false;
  bool edge = false;
  std::unique_ptr<char, Free> bounce;
  int stalls = 0;  // completions in a row that moved nothing

#ifdef TIERFLOW_AIO_FAULTS
  int injected_error = 0;
  long injected_length = -1;
#endif

  // In terms of the store. Bounced memory is not the caller's business: there the whole part counts as failed.
  Failure failed_with(int error, unsigned path) const noexcept {
    if (bounced || next == Op::Sync) return {error, store_offset, user_length, path};
    return {error, store_offset + (offset - user_offset), left, path};
  }
};

// Before the first system call: bounce memory, checksums. 0 or an errno.
int stage(Block& block, File& file) noexcept;

struct Outcome {
  bool again = false;  // issue what is left of the block
  size_t moved = 0;    // bytes
  Failure failure;
};

// After the kernel has moved all it was given: verifies, copies, and turns a read of an edge into its write.
Outcome advance(Block& block, File& file, unsigned path) noexcept;

}  // namespace tierflow::aio
