#include "block.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace tierflow::aio {

namespace {

constexpr size_t kBounceAlignment = 4096;

struct Range {
  char* data;
  uint64_t offset;
  size_t length;
};

// What the kernel is given in all: the caller's part, or the whole grains around it in bounce memory.
Range whole(const Block& block, const File& file) noexcept {
  if (!block.bounced) return {block.user, block.user_offset, block.user_length};
  const uint64_t grain = file.grain();
  const uint64_t begin = block.user_offset / grain * grain;
  const uint64_t end = (block.user_offset + block.user_length + grain - 1) / grain * grain;
  return {block.bounce.get(), begin, static_cast<size_t>(end - begin)};
}

void rewind(Block& block, const Range& range, Op next) noexcept {
  block.next = next;
  block.data = range.data;
  block.offset = range.offset;
  block.left = range.length;
}

// Before the bytes are written and not after: of a write that fails nobody knows what is there, and whoever reads it
// unaware is told so.
void begin_write(Block& block, File& file, const Range& range) noexcept {
  if (block.bounced) std::memcpy(range.data + (block.user_offset - range.offset), block.user, block.user_length);
  if (Checksums* checksums = file.checksums()) checksums->record(range.data, range.offset, range.length);
  rewind(block, range, Op::Write);
}

}  // namespace

int stage(Block& block, File& file) noexcept {
  if (block.ticket->op == Op::Sync) {
    block.next = Op::Sync;
    return 0;
  }
  if (block.bounced) {
    const size_t alignment = std::max<size_t>(kBounceAlignment, file.memory_alignment());
    const size_t nbytes = (whole(block, file).length + alignment - 1) / alignment * alignment;
    block.bounce.reset(static_cast<char*>(std::aligned_alloc(alignment, nbytes)));
    if (!block.bounce) return ENOMEM;
  }
  const Range range = whole(block, file);
  if (block.ticket->op == Op::Write && !block.edge) {
    begin_write(block, file, range);
  } else {
    rewind(block, range, Op::Read);
  }
  return 0;
}

Outcome advance(Block& block, File& file, unsigned path) noexcept {
  if (block.next != Op::Read) return {};
  const Range range = whole(block, file);
  if (const Checksums* checksums = file.checksums()) {
    if (const auto bad = checksums->mismatch(range.data, range.offset, range.length)) {
      return {false, 0, {kCorrupt, block.store_offset + (*bad - block.user_offset), kChecksumBytes, path}};
    }
  }
  if (block.ticket->op == Op::Write) {
    begin_write(block, file, range);
    return {true, 0, {}};
  }
  if (block.bounced) std::memcpy(block.user, range.data + (block.user_offset - range.offset), block.user_length);
  return {};
}

}  // namespace tierflow::aio
