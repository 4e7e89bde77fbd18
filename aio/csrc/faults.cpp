#include "faults.hpp"

#ifdef TIERFLOW_AIO_FAULTS

#include <algorithm>
#include <cstring>
#include <mutex>

namespace tierflow::aio {

namespace {

std::mutex mutex;
std::vector<Fault> rules;

const Fault* match(const Block& block) {
  for (Fault& rule : rules) {
    if (rule.op != block.next || block.offset < rule.begin || block.offset >= rule.end || rule.times == 0) continue;
    if (rule.times > 0) --rule.times;
    return &rule;
  }
  return nullptr;
}

}  // namespace

void set_faults(std::vector<Fault> faults) {
  std::lock_guard<std::mutex> lock(mutex);
  rules = std::move(faults);
}

// A call that is to fail is asked for nothing, and one that is to fall short for the whole sectors of what it will own
// up to: beyond them the file keeps what it had.
size_t kernel_length(Block& block, const File& file) {
  std::lock_guard<std::mutex> lock(mutex);
  const Fault* rule = match(block);
  block.injected_error = rule ? rule->error : 0;
  block.injected_length = rule ? rule->length : -1;
  if (block.injected_error != 0) return 0;
  if (block.injected_length < 0 || static_cast<size_t>(block.injected_length) >= block.left) return block.left;
  return static_cast<size_t>(block.injected_length) / file.alignment() * file.alignment();
}

long kernel_result(Block& block, long result) {
  if (block.injected_error != 0) return -block.injected_error;
  if (block.injected_length < 0 || result < 0) return result;
  const size_t torn = std::min(static_cast<size_t>(block.injected_length), block.left);
  // What a torn sector leaves in memory is anybody's guess.
  if (block.next == Op::Read) std::memset(block.data + result, 0xa5, torn - static_cast<size_t>(result));
  return static_cast<long>(torn);
}

}  // namespace tierflow::aio

#endif
