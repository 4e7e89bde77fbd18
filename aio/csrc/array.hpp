// Several paths as one range of bytes: which part of a transfer goes where, cut so that each path can take it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine.hpp"

namespace tierflow::aio {

// Stripes of `unit` bytes are dealt out to the paths in the order of `pattern`, again and again. One path: no stripes.
class Layout {
 public:
  Layout(uint64_t unit, std::vector<unsigned> pattern, unsigned paths);

  struct Place {
    unsigned path;
    uint64_t offset;  // in the path's file
    uint64_t room;    // bytes that follow there before another path has its turn
  };
  Place at(uint64_t offset) const;

 private:
  const uint64_t unit_;
  const std::vector<unsigned> pattern_;
  std::vector<uint64_t> before_;  // by place in the pattern: stripes of its own path before it
  std::vector<uint64_t> share_;   // by path: stripes of one round
};

struct Request {
  uintptr_t address;
  uint64_t offset;
  uint64_t length;
};

class Array {
 public:
  Array(std::vector<EnginePtr> engines, uint64_t unit, std::vector<unsigned> pattern);

  // One ticket for all requests. Throws std::system_error(ESHUTDOWN) once an engine takes no more.
  TicketPtr submit(Op op, bool urgent, const std::vector<Request>& requests);
  // Ends when every write submitted before is on the medium of its path; writes submitted later go after that.
  TicketPtr sync();

  const std::vector<EnginePtr>& engines() const noexcept { return engines_; }
  uint64_t bytes_moved(Op op) const;
  uint64_t bytes_bounced() const;
  double busy_seconds(Op op) { return meter_->busy_seconds(op); }

 private:
  using Segments = std::vector<std::vector<Segment>>;  // by path

  void place(const TicketPtr& ticket, bool urgent, const Request& request, Segments& out) const;
  void cut(Segment whole, const File& file, std::vector<Segment>& out) const;
  TicketPtr send(TicketPtr ticket, Segments segments);

  const std::vector<EnginePtr> engines_;
  const Layout layout_;
  const std::shared_ptr<Meter> meter_ = std::make_shared<Meter>();
};

}  // namespace tierflow::aio
