#include "engine.hpp"

#include <signal.h>

#include <chrono>

#include "completion.hpp"
#include "faults.hpp"

namespace tierflow::aio {

namespace {

// "Later" from the kernel is answered at once the first time, then after a pause that doubles up to two milliseconds.
std::chrono::microseconds pause_after(int stalls) {
  if (stalls < 2) return std::chrono::microseconds(0);
  return std::chrono::microseconds(std::min(1 << std::min(stalls, 12), 2000));
}

}  // namespace

bool Engine::submit(std::vector<Segment> segments) {
  for (const Segment& segment : segments) {
    if (segment.bounced) bounced_ += segment.length;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (closing_) return false;
  for (Segment& segment : segments) backlog_.push(std::move(segment));
  wake();
  return true;
}

bool Engine::closing() {
  std::lock_guard<std::mutex> lock(mutex_);
  return closing_;
}

bool Engine::take(std::unique_lock<std::mutex>& lock, Block& out, bool even_early) {
  while (backlog_.pop(out, even_early)) {
    if (!out.ticket->failed()) return true;
    lock.unlock();
    retire(out, {});
    lock.lock();
  }
  return false;
}

bool Engine::begin(Block& block) {
  block.ticket->begin();
  if (block.stalls > 0) return true;  // back from a pause, and staged before it
  const int error = stage(block, *file_);
  if (error != 0) retire(block, block.failed_with(error, path_));
  return error == 0;
}

bool Engine::complete(Block& block, long result) {
  Outcome outcome = settle(block, kernel_result(block, result), *file_, path_);
  if (!block.bounced) moved(block, outcome.moved);
  if (outcome.again) return block.stalls == 0 || later(block);
  if (outcome.failure.error == 0) outcome = advance(block, *file_, path_);
  if (outcome.again) return true;
  if (block.bounced && outcome.failure.error == 0) moved(block, block.user_length);
  retire(block, outcome.failure);
  return false;
}

// True: no pause is due yet.
bool Engine::later(Block& block) {
  const auto pause = pause_after(block.stalls);
  if (pause.count() == 0) return true;
  std::lock_guard<std::mutex> lock(mutex_);
  backlog_.delay(std::move(block), Clock::now() + pause);
  wake();  // whoever sleeps has to know when to get up
  return false;
}

void Engine::retire(Block& block, const Failure& failure) {
  const TicketPtr ticket = std::move(block.ticket);
  block.bounce.reset();
  ticket->block_done(failure);  // before others go because of it: by the times, too, it ends before they begin
  std::lock_guard<std::mutex> lock(mutex_);
  if (backlog_.release(block, ticket->op) || closing_) wake();
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
