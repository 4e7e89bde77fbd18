// The device's memory: host memory in blocks that are handed on within their stream, as torch's caching allocator does.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "streams.hpp"

namespace emulated {

constexpr std::size_t kRound = 512;

struct MemoryStats {
  std::size_t allocated = 0, reserved = 0, peak_allocated = 0, peak_reserved = 0, device_allocs = 0;
};

class Memory final : public c10::Allocator {
 public:
  static Memory& the() {
    static auto* const memory = new Memory;
    return *memory;
  }

  c10::DataPtr allocate(std::size_t nbytes) override {
    const c10::Device device(c10::DeviceType::CUDA, 0);
    if (nbytes == 0) return {nullptr, nullptr, &Memory::give_back, device};
    void* const found = take((nbytes + kRound - 1) / kRound * kRound);
    return {found, found, &Memory::give_back, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &Memory::give_back; }
  void copy_data(void* dst, const void* src, std::size_t count) const override {
    current_queue().drain();
    std::memcpy(dst, src, count);
  }

  // What another stream does with the block until now comes before anybody else has it.
  void used_on(void* data, std::int64_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.find(data);
    if (found != blocks_.end() && found->second.stream != stream) found->second.used_on.insert(stream);
  }

  void empty_cache() {
    Streams::all().drain();
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [key, free] : free_)
      for (void* block : free) {
        std::free(block);
        stats_.reserved -= key.second;
      }
    free_.clear();
  }

  MemoryStats stats() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }
  void reset_peaks() {
    const std::lock_guard<std::mutex> lock(mutex_);
    stats_.peak_allocated = stats_.allocated;
    stats_.peak_reserved = stats_.reserved;
  }
  void limit(std::size_t nbytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = nbytes;
  }

 private:
  struct Block {
    std::size_t nbytes;
    std::int64_t stream;
    std::set<std::int64_t> used_on;
  };

  void* take(std::size_t nbytes) {
    for (const bool last : {false, true}) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (void* const found = find(nbytes)) return found;
      }
      if (!last) empty_cache();
    }
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory (emulated): ", nbytes, " bytes were asked for");
  }

  void* find(std::size_t nbytes) {
    const std::int64_t stream = current();
    auto& free = free_[{stream, nbytes}];
    void* block = nullptr;
    if (!free.empty()) {
      block = free.back();
      free.pop_back();
    } else {
      if (stats_.reserved + nbytes > limit_) return nullptr;
      block = std::aligned_alloc(kRound, nbytes);
      std::memset(block, 0xFF, nbytes);
      stats_.reserved += nbytes;
      ++stats_.device_allocs;
    }
    blocks_[block] = {nbytes, stream, {}};
    stats_.allocated += nbytes;
    stats_.peak_allocated = std::max(stats_.peak_allocated, stats_.allocated);
    stats_.peak_reserved = std::max(stats_.peak_reserved, stats_.reserved);
    return block;
  }

  // The stream that took the block may have it again at once; what others read there from now on is NaN.
  static void give_back(void* data) {
    if (data == nullptr) return;
    Memory& memory = the();
    const std::lock_guard<std::mutex> lock(memory.mutex_);
    const auto found = memory.blocks_.find(data);
    const Block block = found->second;
    memory.blocks_.erase(found);
    memory.stats_.allocated -= block.nbytes;
    std::vector<std::shared_ptr<Moment>> readers;
    for (const std::int64_t id : block.used_on) readers.push_back(Streams::all().queue(id).mark());
    Streams::all().queue(block.stream).submit([data, readers, nbytes = block.nbytes] {
      for (const auto& reader : readers) reader->wait();
      std::memset(data, 0xFF, nbytes);
    });
    memory.free_[{block.stream, block.nbytes}].push_back(data);
  }

  std::mutex mutex_;
  std::unordered_map<void*, Block> blocks_;
  std::map<std::pair<std::int64_t, std::size_t>, std::vector<void*>> free_;
  MemoryStats stats_;
  std::size_t limit_ = std::size_t{8} << 30;
};

// Host memory that the driver knows: copies to and from it run behind the caller's back.
class Registered {
 public:
  static Registered& all() {
    static auto* const registered = new Registered;
    return *registered;
  }
  int add(std::uintptr_t begin, std::size_t nbytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (overlaps(begin, nbytes)) return 712;
    ranges_[begin] = nbytes;
    return 0;
  }
  int remove(std::uintptr_t begin) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return ranges_.erase(begin) ? 0 : 713;
  }
  // Whether all of it lies in one registration. Raises where a part of it does, as the driver refuses such a copy.
  bool has(const void* data, std::size_t nbytes) {
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    const std::lock_guard<std::mutex> lock(mutex_);
    auto after = ranges_.upper_bound(begin);
    if (after != ranges_.begin()) {
      const auto& [at, size] = *std::prev(after);
      if (begin + nbytes <= at + size) return true;
    }
    TORCH_CHECK(!overlaps(begin, nbytes), "CUDA error: invalid argument (emulated: a copy crosses the end of a registration)");
    return false;
  }

 private:
  bool overlaps(std::uintptr_t begin, std::size_t nbytes) {
    const auto after = ranges_.lower_bound(begin + nbytes);
    if (after == ranges_.begin()) return false;
    const auto& [at, size] = *std::prev(after);
    return at + size > begin;
  }
  std::mutex mutex_;
  std::map<std::uintptr_t, std::size_t> ranges_;
};

}  // namespace emulated
