#include "checksum.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <sys/auxv.h>
#endif

namespace tierflow::aio {

namespace {

using Pages = void (*)(const char*, size_t, uint32_t*) noexcept;

constexpr size_t kBatch = 64;  // pages whose checksums are worked out at a time

// Eight tables: eight bytes a step.
using Tables = std::array<std::array<uint32_t, 256>, 8>;

Tables make_tables() {
  Tables t{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82f63b78u : 0u);
    t[0][byte] = crc;
  }
  for (size_t k = 1; k < t.size(); ++k) {
    for (size_t byte = 0; byte < 256; ++byte) t[k][byte] = (t[k - 1][byte] >> 8) ^ t[0][t[k - 1][byte] & 255];
  }
  return t;
}

uint64_t load(const char* data) noexcept {
  uint64_t word;
  std::memcpy(&word, data, sizeof(word));
  return word;
}

#if defined(__x86_64__)
#define TIERFLOW_CRC_TARGET __attribute__((target("sse4.2")))
#define TIERFLOW_CRC_STEP(crc, word) _mm_crc32_u64(crc, word)
bool supported() noexcept { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__) && defined(__linux__)
#define TIERFLOW_CRC_TARGET __attribute__((target("+crc")))
#define TIERFLOW_CRC_STEP(crc, word) __crc32cd(static_cast<uint32_t>(crc), word)
bool supported() noexcept { return (getauxval(AT_HWCAP) & (1u << 7)) != 0; }
#endif

#ifdef TIERFLOW_CRC_TARGET
TIERFLOW_CRC_TARGET uint32_t one_page(const char* data) noexcept {
  uint64_t crc = 0xffffffffu;
  for (size_t at = 0; at < kChecksumBytes; at += 8) crc = TIERFLOW_CRC_STEP(crc, load(data + at));
  return ~static_cast<uint32_t>(crc);
}

// The instruction has a latency of three and starts one each cycle: three pages side by side keep it busy, and nothing
// has to be put together afterwards.
TIERFLOW_CRC_TARGET void pages_in_hardware(const char* data, size_t count, uint32_t* out) noexcept {
  for (; count >= 3; count -= 3, data += 3 * kChecksumBytes, out += 3) {
    uint64_t a = 0xffffffffu, b = a, c = a;
    for (size_t at = 0; at < kChecksumBytes; at += 8) {
      a = TIERFLOW_CRC_STEP(a, load(data + at));
      b = TIERFLOW_CRC_STEP(b, load(data + kChecksumBytes + at));
      c = TIERFLOW_CRC_STEP(c, load(data + 2 * kChecksumBytes + at));
    }
    out[0] = ~static_cast<uint32_t>(a);
    out[1] = ~static_cast<uint32_t>(b);
    out[2] = ~static_cast<uint32_t>(c);
  }
  for (; count > 0; --count, data += kChecksumBytes, ++out) *out = one_page(data);
}

Pages choose() noexcept { return supported() ? pages_in_hardware : crc32c_pages_table; }
#else
Pages choose() noexcept { return crc32c_pages_table; }
#endif

const Pages chosen = choose();

size_t table_bytes(uint64_t nbytes) noexcept {
  return std::max<size_t>(nbytes / kChecksumBytes, 1) * sizeof(std::atomic<uint32_t>);
}

// 0 stands for "never recorded", so that a checksum of 0 is told as 1.
uint32_t told(uint32_t crc) noexcept { return crc == 0 ? 1 : crc; }

}  // namespace

uint32_t crc32c_table(const char* data, size_t nbytes) noexcept {
  static const Tables t = make_tables();
  uint32_t crc = 0xffffffffu;
  for (; nbytes >= 8; nbytes -= 8, data += 8) {
    unsigned char b[8];
    std::memcpy(b, data, 8);
    for (int i = 0; i < 4; ++i) b[i] = static_cast<unsigned char>(b[i] ^ (crc >> (8 * i)));
    crc = t[7][b[0]] ^ t[6][b[1]] ^ t[5][b[2]] ^ t[4][b[3]] ^ t[3][b[4]] ^ t[2][b[5]] ^ t[1][b[6]] ^ t[0][b[7]];
  }
  for (; nbytes > 0; --nbytes, ++data) crc = (crc >> 8) ^ t[0][(crc ^ static_cast<unsigned char>(*data)) & 255];
  return ~crc;
}

void crc32c_pages_table(const char* data, size_t count, uint32_t* out) noexcept {
  for (; count > 0; --count, data += kChecksumBytes, ++out) *out = crc32c_table(data, kChecksumBytes);
}

void crc32c_pages(const char* data, size_t count, uint32_t* out) noexcept { chosen(data, count, out); }

bool crc32c_in_hardware() noexcept { return chosen != crc32c_pages_table; }

Checksums::Checksums(uint64_t nbytes) : mapped_(table_bytes(nbytes)) {
  void* memory = ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  slots_ = static_cast<std::atomic<uint32_t>*>(memory);
}

Checksums::~Checksums() { ::munmap(slots_, mapped_); }

void Checksums::record(const char* data, uint64_t offset, size_t nbytes) noexcept {
  uint32_t found[kBatch];
  std::atomic<uint32_t>* slot = slots_ + offset / kChecksumBytes;
  for (size_t left = nbytes / kChecksumBytes; left > 0;) {
    const size_t count = std::min(left, kBatch);
    crc32c_pages(data, count, found);
    for (size_t i = 0; i < count; ++i) (slot++)->store(told(found[i]), std::memory_order_relaxed);
    data += count * kChecksumBytes;
    left -= count;
  }
}

std::optional<uint64_t> Checksums::mismatch(const char* data, uint64_t offset, size_t nbytes) const noexcept {
  uint32_t found[kBatch];
  for (size_t at = 0; at < nbytes;) {
    const size_t count = std::min((nbytes - at) / kChecksumBytes, kBatch);
    crc32c_pages(data + at, count, found);
    for (size_t i = 0; i < count; ++i, at += kChecksumBytes) {
      const uint32_t known = slots_[(offset + at) / kChecksumBytes].load(std::memory_order_relaxed);
      if (known != 0 && known != told(found[i])) return offset + at;
    }
  }
  return std::nullopt;
}

}  // namespace tierflow::aio
