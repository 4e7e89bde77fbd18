// The border to the kernel: how much a system call is asked for, and what it is taken to have answered. An ordinary
// build passes both through. A build with TIERFLOW_AIO_FAULTS lets tests fail calls there, alike for both engines,
// which no file system does: io_uring resumes most short transfers itself, and not all of them rightly.
#pragma once

#include <string>
#include <vector>

#include "block.hpp"

namespace tierflow::aio {

#ifdef TIERFLOW_AIO_FAULTS

struct Fault {
  Op op;
  uint64_t begin, end;  // file offsets of the call
  int64_t times;        // how often it applies; negative: always
  int error;            // 0: none
  long length;          // own up to so many bytes at most; negative: to all
};

// Replaces what was there; the first that matches a call decides it.
void set_faults(std::vector<Fault> faults);

size_t kernel_length(Block& block, const File& file);
long kernel_result(Block& block, long result);

#else

inline size_t kernel_length(Block& block, const File&) noexcept { return block.left; }
inline long kernel_result(Block&, long result) noexcept { return result; }

#endif

}  // namespace tierflow::aio
