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

// First in, first out, over all tickets. A ticket is cut as its blocks are taken, so that a large one costs one
// entry here and not one for each block.
class Backlog {
 public:
  explicit Backlog(size_t block_size) : block_size_(block_size) {}

  uint64_t blocks_of(uint64_t length) const { return (length + block_size_ - 1) / block_size_; }
  bool empty() const { return waiting_.empty(); }
  void push(TicketPtr ticket) { waiting_.push_back(std::move(ticket)); }

  bool pop(Block& out) {
    if (waiting_.empty()) return false;
    const TicketPtr& ticket = waiting_.front();
    if (cut_ == 0) ticket->begin();
    out.ticket = ticket;
    out.data = ticket->data + cut_;
    out.offset = ticket->offset + cut_;
    out.left = static_cast<size_t>(std::min<uint64_t>(block_size_, ticket->length - cut_));
    out.stalls = 0;
    cut_ += out.left;
    if (cut_ == ticket->length) {
      waiting_.pop_front();
      cut_ = 0;
    }
    return true;
  }

 private:
  const size_t block_size_;
  std::deque<TicketPtr> waiting_;
  uint64_t cut_ = 0;  // bytes of the front ticket already taken
};

}  // namespace tierflow::aio
