// What one completed system call means for its block. Both engines come through here and decide nothing themselves.
#pragma once

#include <algorithm>
#include <cerrno>

#include "block.hpp"

namespace tierflow::aio {

// Completions in a row that move nothing before the block is given up: EAGAIN and EINTR are the kernel's way of
// saying "later", and at one pause each this is a second of them.
constexpr int kMostStalls = 500;
// Direct I/O that stops inside a sector is repeated from the sector's start, and moves nothing if that was its first.
// Once may be chance; a file that ends inside a sector answers so forever.
constexpr int kStallOfTornSector = 125;

// `result` is the system call's: bytes, or -errno.
inline Outcome settle(Block& block, long result, const File& file, unsigned path) {
  const auto fail = [&](int error) { return Outcome{false, 0, block.failed_with(error, path)}; };
  const auto stalled = [&](int by, int error) {
    block.stalls += by;
    return block.stalls <= kMostStalls ? Outcome{true, 0, {}} : fail(error);
  };
  if (result == -EAGAIN || result == -EINTR) return stalled(1, static_cast<int>(-result));
  if (result < 0) return fail(static_cast<int>(-result));
  if (block.next == Op::Sync) return {};

  const int at_end = block.next == Op::Read ? kEndOfFile : EIO;
  if (result == 0) return fail(at_end);
  size_t moved = std::min(static_cast<size_t>(result), block.left);
  if (moved < block.left && file.direct()) {
    moved -= moved % file.alignment();
    if (moved == 0) return stalled(kStallOfTornSector, at_end);
  }
  block.data += moved;
  block.offset += moved;
  block.left -= moved;
  block.stalls = 0;
  return {block.left > 0, moved, {}};
}

}  // namespace tierflow::aio
