#include "array.hpp"

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace tierflow::aio {

Layout::Layout(uint64_t unit, std::vector<unsigned> pattern, unsigned paths)
    : unit_(unit), pattern_(std::move(pattern)), share_(paths, 0) {
  for (const unsigned path : pattern_) before_.push_back(share_.at(path)++);
}

Layout::Place Layout::at(uint64_t offset) const {
  if (share_.size() == 1) return {0, offset, ~uint64_t{0}};
  const uint64_t stripe = offset / unit_, within = offset % unit_;
  const uint64_t round = stripe / pattern_.size(), turn = stripe % pattern_.size();
  const unsigned path = pattern_[turn];
  return {path, (round * share_[path] + before_[turn]) * unit_ + within, unit_ - within};
}

Array::Array(std::vector<EnginePtr> engines, uint64_t unit, std::vector<unsigned> pattern)
    : engines_(std::move(engines)), layout_(unit, std::move(pattern), static_cast<unsigned>(engines_.size())) {}

TicketPtr Array::submit(Op op, bool urgent, const std::vector<Request>& requests) {
  TicketPtr ticket(new Ticket(op, meter_), LeakInChild{});
  Segments segments(engines_.size());
  for (const Request& request : requests) place(ticket, urgent, request, segments);
  return send(std::move(ticket), std::move(segments));
}

TicketPtr Array::sync() {
  TicketPtr ticket(new Ticket(Op::Sync, meter_), LeakInChild{});
  Segments segments(engines_.size());
  for (auto& of_path : segments) {
    of_path.emplace_back();
    of_path.back().ticket = ticket;
  }
  return send(std::move(ticket), std::move(segments));
}

void Array::place(const TicketPtr& ticket, bool urgent, const Request& request, Segments& out) const {
  for (uint64_t done = 0; done < request.length;) {
    const Layout::Place place = layout_.at(request.offset + done);
    Segment segment;
    segment.ticket = ticket;
    segment.data = reinterpret_cast<char*>(request.address) + done;
    segment.offset = place.offset;
    segment.length = std::min(request.length - done, place.room);
    segment.store_offset = request.offset + done;
    segment.urgent = urgent;
    done += segment.length;
    cut(std::move(segment), engines_[place.path]->file(), out[place.path]);
  }
}

// Into the incomplete grains at both ends and the whole ones between them.
void Array::cut(Segment whole, const File& file, std::vector<Segment>& out) const {
  const uint64_t grain = file.grain();
  const auto add = [&](uint64_t length, bool edge) {
    if (length == 0) return;
    Segment part = whole;
    part.length = length;
    part.edge = edge;
    part.bounced = edge || reinterpret_cast<uintptr_t>(part.data) % file.memory_alignment() != 0;
    whole.data += length;
    whole.offset += length;
    whole.store_offset += length;
    whole.length -= length;
    out.push_back(std::move(part));
  };
  const uint64_t into = whole.offset % grain;
  add(into == 0 ? 0 : std::min(grain - into, whole.length), true);
  add(whole.length / grain * grain, false);
  add(whole.length, true);
}

TicketPtr Array::send(TicketPtr ticket, Segments segments) {
  for (const EnginePtr& engine : engines_) {
    if (engine->closing()) throw std::system_error(ESHUTDOWN, std::generic_category(), "submit");
  }
  std::vector<uint64_t> blocks(engines_.size(), 0);
  uint64_t all = 0;
  for (size_t path = 0; path < segments.size(); ++path) {
    for (const Segment& segment : segments[path]) blocks[path] += engines_[path]->blocks_of(segment.length);
    all += blocks[path];
  }
  ticket->start(all);
  for (size_t path = 0; path < segments.size(); ++path) {
    if (segments[path].empty() || engines_[path]->submit(std::move(segments[path]))) continue;
    // Lost between the look and now: the ticket is out on other paths, so it has to tell.
    for (uint64_t i = 0; i < blocks[path]; ++i) ticket->block_done({ESHUTDOWN, 0, 0, static_cast<unsigned>(path)});
  }
  return ticket;
}

uint64_t Array::bytes_moved(Op op) const {
  uint64_t sum = 0;
  for (const EnginePtr& engine : engines_) sum += engine->bytes_moved(op);
  return sum;
}

uint64_t Array::bytes_bounced() const {
  uint64_t sum = 0;
  for (const EnginePtr& engine : engines_) sum += engine->bytes_bounced();
  return sum;
}

}  // namespace tierflow::aio
