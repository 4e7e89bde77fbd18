#include "engine.hpp"

#include <signal.h>

#include <chrono>
#include <system_error>

#include "completion.hpp"

namespace tierflow::aio {

namespace {

// "Later" from the kernel is answered with a pause that doubles up to two milliseconds; the first is free.
void nap(int stalls) {
  if (stalls < 2) return;
  const int doublings = stalls < 12 ? stalls : 12;
  std::this_thread::sleep_for(std::chrono::microseconds(std::min(1 << doublings, 2000)));
}

}  // namespace

void Engine::submit(TicketPtr ticket) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closing_) throw std::system_error(ESHUTDOWN, std::generic_category(), "submit");
  ticket->start(backlog_.blocks_of(ticket->length));
  Lane& lane = lanes_[index(ticket->op)];
  backlog_.push(std::move(ticket));
  if (lane.tickets++ == 0) lane.since = Clock::now();
  wake();
}

double Engine::busy_seconds(Op op) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Lane& lane = lanes_[index(op)];
  Clock::duration busy = lane.busy;
  if (lane.tickets > 0) busy += Clock::now() - lane.since;
  return std::chrono::duration<double>(busy).count();
}

bool Engine::complete(Block& block, long result) {
  const Failure failed_part{0, block.offset, block.left};
  const Outcome outcome = settle(block, result);
  lanes_[index(block.ticket->op)].bytes += outcome.moved;
  if (outcome.again) {
    nap(block.stalls);
    return true;
  }
  const TicketPtr ticket = std::move(block.ticket);
  Failure failure = failed_part;
  failure.error = outcome.error;
  if (ticket->block_done(failure)) end(ticket);
  return false;
}

void Engine::end(const TicketPtr& ticket) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Lane& lane = lanes_[index(ticket->op)];
    if (--lane.tickets == 0) lane.busy += Clock::now() - lane.since;
  }
  ticket->finish();  // last, so that whoever waited finds the books done
}

std::thread start_thread(std::function<void()> body) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  struct Restore {
    const sigset_t& mask;
    ~Restore() { pthread_sigmask(SIG_SETMASK, &mask, nullptr); }
  } restore{before};
  return std::thread(std::move(body));
}

}  // namespace tierflow::aio
