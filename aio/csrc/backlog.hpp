// Blocks, and the queue of what is not yet issued. No locks here: the engine's mutex guards it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <utility>

#include "ticket.hpp"

namespace tierflow::aio {

// A contiguous part of one ticket that is issued as one system call; shrinks from the front as bytes are moved.
struct Block {
  TicketPtr ticket;
  char* data = nullptr;
  uint64_t offset = 0;
  size_t left = 0;
  int stalls = 0;  // completions in a row that moved nothing
};

// First in, first out among reads and among writes, and every read before any write: somebody waits for what is read,
// and what is written only has to be gone before its memory is needed. A ticket is cut as its blocks are taken, so that
// a large one costs one entry here and not one for each block.
class Backlog {
 public:
  explicit Backlog(size_t block_size) : block_size_(block_size) {}

  uint64_t blocks_of(uint64_t length) const { return (length + block_size_ - 1) / block_size_; }
  bool empty() const { return reads_.waiting.empty() && writes_.waiting.empty(); }

  void push(TicketPtr ticket) {
    Line& line = ticket->op == Op::Read ? reads_ : writes_;
    line.waiting.push_back(std::move(ticket));
  }

  bool pop(Block& out) {
    if (empty()) return false;
    Line& line = reads_.waiting.empty() ? writes_ : reads_;
    const TicketPtr& ticket = line.waiting.front();
    if (line.cut == 0) ticket->begin();
    out.ticket = ticket;
    out.data = ticket->data + line.cut;
    out.offset = ticket->offset + line.cut;
    out.left = static_cast<size_t>(std::min<uint64_t>(block_size_, ticket->length - line.cut));
    out.stalls = 0;
    line.cut += out.left;
    if (line.cut == ticket->length) {
      line.waiting.pop_front();
      line.cut = 0;
    }
    return true;
  }

 private:
  struct Line {
    std::deque<TicketPtr> waiting;
    uint64_t cut = 0;  // bytes of the front ticket already taken
  };

  const size_t block_size_;
  Line reads_;
  Line writes_;
};

}  // namespace tierflow::aio
