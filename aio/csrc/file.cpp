#include "file.hpp"

#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>

namespace tierflow::aio {

namespace {

// The kernel's struct statx up to and with the DIOALIGN fields. Spelled out because the C library's headers of the
// oldest build machines end before them; the kernel fills 256 bytes whatever the headers say.
struct StatxBuffer {
  uint32_t mask;
  unsigned char before[148];
  uint32_t dio_mem_align;
  uint32_t dio_offset_align;
  unsigned char after[96];
};
static_assert(sizeof(StatxBuffer) == 256, "the kernel's struct statx has 256 bytes");

constexpr unsigned kStatxDioalign = 0x2000;

}  // namespace

void File::close() noexcept {
  const int fd = fd_.exchange(-1);
  if (fd >= 0) ::close(fd);
}

std::optional<DirectAlignment> direct_alignment(int fd) {
#ifdef SYS_statx
  StatxBuffer buffer;
  std::memset(&buffer, 0, sizeof(buffer));
  if (::syscall(SYS_statx, fd, "", AT_EMPTY_PATH, kStatxDioalign, &buffer) == 0 && (buffer.mask & kStatxDioalign)) {
    return DirectAlignment{buffer.dio_mem_align, buffer.dio_offset_align};
  }
#else
  (void)fd;
#endif
  return std::nullopt;
}

uint64_t filesystem_magic(int fd) {
  struct statfs info;
  if (::fstatfs(fd, &info) != 0) throw std::system_error(errno, std::generic_category(), "fstatfs");
  return static_cast<uint64_t>(static_cast<unsigned long>(info.f_type));
}

void reserve(int fd, uint64_t nbytes) {
  int result;
  do {
    result = ::fallocate(fd, 0, 0, static_cast<off_t>(nbytes));
  } while (result != 0 && errno == EINTR);
  if (result != 0) throw std::system_error(errno, std::generic_category(), "fallocate");
}

}  // namespace tierflow::aio
