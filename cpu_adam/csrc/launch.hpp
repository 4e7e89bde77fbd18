// Whole arrays: split into ranges, given to the pool, the results put together in a fixed order.
#pragma once

#include <vector>

#include "kernels.hpp"

namespace cpu_adam {

// A step over the n elements of one sequence.
struct Call {
  StepFn step;
  StepArgs args;
  std::size_t n;
};

// Null where the combination is not offered.
StepFn step_function(const Kernels& k, Rule rule, Master master, Moments moments, Dtype grad, bool general);
// No two calls may write to the same memory: they run side by side.
void launch_steps(const std::vector<Call>& calls, int threads);
double launch_intake(const Kernels& k, void* dst, Dtype dst_dtype, const void* src, Dtype src_dtype, bool accumulate,
                     std::size_t n, int threads);
double launch_stats(const Kernels& k, const void* src, Dtype dtype, std::size_t n, int threads);
void launch_split(const Kernels& k, const float* master, std::uint16_t* param, std::int16_t* remainder,
                  std::size_t n, int threads);
void launch_join(const Kernels& k, const std::uint16_t* param, const std::int16_t* remainder, float* master,
                 std::size_t n, int threads);
void launch_stream(const Kernels& k, const StreamArray* arrays, int count, std::size_t n, int threads);

}  // namespace cpu_adam
