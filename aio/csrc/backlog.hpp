// What is not yet issued, and what has to wait for what. No locks here: the engine's mutex guards it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <unordered_map>
#include <utility>

#include "block.hpp"

namespace tierflow::aio {

// So many urgent blocks may go before one that is not, while both wait.
constexpr unsigned kUrgentInARow = 16;

// Two lines, each first in, first out: somebody waits for what is urgent (reads, if nothing else is said), and what is
// not (writes) only has to be gone before its memory is needed; but it does move on, whatever is urgent.
//
// [Note: edges] Two transfers that share a grain and no byte must not see each other's halves: one edge of a grain is
// out at a time, the next ones are parked behind it.
//
// [Note: barriers] A Sync is issued once the writes before it are done, and the writes behind it once it is done.
class Backlog {
 public:
  Backlog(size_t block_size, uint64_t grain) : block_size_(block_size), grain_(grain) {}

  uint64_t blocks_of(uint64_t length) const {
    return std::max<uint64_t>((length + block_size_ - 1) / block_size_, 1);
  }

  // Nothing waits here; what is out with the kernel does not count.
  bool idle() const {
    return lines_[0].waiting.empty() && lines_[1].waiting.empty() && ready_.empty() && delayed_.empty() &&
           parked_ == 0 && held_.empty();
  }
  bool has_work() const { return !lines_[0].waiting.empty() || !lines_[1].waiting.empty() || !ready_.empty(); }

  void push(Segment segment) {
    if (!held_.empty() && segment.ticket->op != Op::Read) {
      held_.push_back(std::move(segment));
    } else if (segment.ticket->op == Op::Sync) {
      held_.push_back(std::move(segment));
      raise_barrier();
    } else {
      admit(std::move(segment));
    }
  }

  bool pop(Block& out, bool even_early = false) {
    for (;;) {
      if (!delayed_.empty() && (even_early || delayed_.begin()->first <= Clock::now())) {
        out = std::move(delayed_.begin()->second);
        delayed_.erase(delayed_.begin());
        return true;
      }
      if (!ready_.empty()) {
        out = std::move(ready_.front());
        ready_.pop_front();
        return true;
      }
      if (!cut(out)) return false;
      if (!out.edge || enter(out)) return true;
    }
  }

  // A block that the kernel wants asked for again later. Other blocks go meanwhile.
  void delay(Block block, Clock::time_point until) { delayed_.emplace(until, std::move(block)); }
  std::optional<Clock::time_point> next_due() const {
    return delayed_.empty() ? std::nullopt : std::optional<Clock::time_point>(delayed_.begin()->first);
  }

  // A block is over. True where that lets others go.
  bool release(const Block& block, Op op) {
    bool more = false;
    if (block.edge) more = leave(block.user_offset / grain_);
    if (op == Op::Write && --writes_ == 0) more = raise_barrier() || more;
    if (op == Op::Sync) {
      held_.pop_front();
      barrier_out_ = false;
      while (!held_.empty() && held_.front().ticket->op == Op::Write) {
        admit(std::move(held_.front()));
        held_.pop_front();
      }
      raise_barrier();
      more = true;
    }
    return more;
  }

 private:
  struct Line {
    std::deque<Segment> waiting;
    uint64_t cut = 0;  // bytes of the front segment already taken
  };

  void admit(Segment segment) {
    if (segment.ticket->op == Op::Write) writes_ += blocks_of(segment.length);
    Line& line = lines_[segment.urgent ? 0 : 1];
    line.waiting.push_back(std::move(segment));
  }

  Line& turn() {
    Line &urgent = lines_[0], &other = lines_[1];
    if (other.waiting.empty()) {
      in_a_row_ = 0;
      return urgent;
    }
    if (urgent.waiting.empty() || in_a_row_ >= kUrgentInARow) {
      in_a_row_ = 0;
      return other;
    }
    ++in_a_row_;
    return urgent;
  }

  bool cut(Block& out) {
    Line& line = turn();
    if (line.waiting.empty()) return false;
    const Segment& segment = line.waiting.front();
    out = begin_block(segment);
    out.user = out.data = segment.data + line.cut;
    out.user_offset = out.offset = segment.offset + line.cut;
    out.user_length = out.left = static_cast<size_t>(std::min<uint64_t>(block_size_, segment.length - line.cut));
    out.store_offset = segment.store_offset + line.cut;
    line.cut += out.left;
    if (line.cut == segment.length) {
      line.waiting.pop_front();
      line.cut = 0;
    }
    return true;
  }

  static Block begin_block(const Segment& segment) {
    Block block;
    block.ticket = segment.ticket;
    block.next = segment.ticket->op;
    block.bounced = segment.bounced;
    block.edge = segment.edge;
    return block;
  }

  // False: parked.
  bool enter(Block& block) {
    const auto [found, free] = edges_.try_emplace(block.user_offset / grain_);
    if (free) return true;
    found->second.push_back(std::move(block));
    ++parked_;
    return false;
  }

  bool leave(uint64_t grain) {
    const auto found = edges_.find(grain);
    if (found->second.empty()) {
      edges_.erase(found);
      return false;
    }
    ready_.push_back(std::move(found->second.front()));
    found->second.pop_front();
    --parked_;
    return true;
  }

  bool raise_barrier() {
    if (held_.empty() || barrier_out_ || writes_ > 0) return false;
    ready_.push_back(begin_block(held_.front()));
    return barrier_out_ = true;
  }

  const size_t block_size_;
  const uint64_t grain_;
  Line lines_[2];  // urgent, not
  unsigned in_a_row_ = 0;
  std::multimap<Clock::time_point, Block> delayed_;
  std::deque<Block> ready_;
  std::unordered_map<uint64_t, std::deque<Block>> edges_;  // by grain: what waits for the one that is out
  size_t parked_ = 0;
  uint64_t writes_ = 0;        // blocks admitted and not over
  std::deque<Segment> held_;   // a Sync in front, then what is behind it
  bool barrier_out_ = false;
};

}  // namespace tierflow::aio
