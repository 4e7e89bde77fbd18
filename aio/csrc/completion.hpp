// What one completed system call means for its block. Both engines come through here and decide nothing themselves.
#pragma once

#include <cerrno>

#include "backlog.hpp"

namespace tierflow::aio {

// Completions in a row that move nothing before the block is given up: EAGAIN and EINTR are the kernel's way of
// saying "later", and at one nap each this is a second of them.
constexpr int kMostStalls = 500;
// Direct I/O that stops inside a sector is repeated from the sector's start, and moves nothing if that was its first.
// Once may be chance; a file that ends inside a sector answers so forever.
constexpr int kStallOfTornSector = 125;

struct Outcome {
  bool again = false;  // issue the block's remainder
  size_t moved = 0;    // bytes
  int error = 0;       // errno or kEndOfFile
};

// `result` is the system call's: bytes, or -errno.
inline Outcome settle(Block& block, long result) {
  if (result == -EAGAIN || result == -EINTR) {
    if (++block.stalls <= kMostStalls) return {true, 0, 0};
    return {false, 0, static_cast<int>(-result)};
  }
  if (result < 0) return {false, 0, static_cast<int>(-result)};

  const bool read = block.ticket->op == Op::Read;
  if (result == 0) return {false, 0, read ? kEndOfFile : EIO};

  size_t moved = std::min(static_cast<size_t>(result), block.left);
  if (moved < block.left && block.ticket->file->direct()) {
    moved -= moved % block.ticket->file->alignment();
    if (moved == 0) {
      block.stalls += kStallOfTornSector;
      if (block.stalls <= kMostStalls) return {true, 0, 0};
      return {false, 0, read ? kEndOfFile : EIO};
    }
  }
  block.data += moved;
  block.offset += moved;
  block.left -= moved;
  block.stalls = 0;
  return {block.left > 0, moved, 0};
}

}  // namespace tierflow::aio
