// CRC32C (Castagnoli) of a file's bytes, 4096 at a time, kept in memory beside the file.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace tierflow::aio {

constexpr size_t kChecksumBytes = 4096;

uint32_t crc32c_table(const char* data, size_t nbytes) noexcept;

// One checksum for each kChecksumBytes of data: `count` of them. The processor's own instruction where it has one.
void crc32c_pages(const char* data, size_t count, uint32_t* out) noexcept;
void crc32c_pages_table(const char* data, size_t count, uint32_t* out) noexcept;
bool crc32c_in_hardware() noexcept;

class Checksums {
 public:
  // Throws std::bad_alloc. Memory is taken as pages are written: four bytes for each of them.
  explicit Checksums(uint64_t nbytes);
  ~Checksums();
  Checksums(const Checksums&) = delete;
  Checksums& operator=(const Checksums&) = delete;

  // Offsets and lengths are whole pages. What was never recorded is not verified.
  void record(const char* data, uint64_t offset, size_t nbytes) noexcept;
  // The offset of the first page that is not what was recorded.
  std::optional<uint64_t> mismatch(const char* data, uint64_t offset, size_t nbytes) const noexcept;

 private:
  std::atomic<uint32_t>* slots_;  // 0: never recorded
  const size_t mapped_;
};

}  // namespace tierflow::aio
