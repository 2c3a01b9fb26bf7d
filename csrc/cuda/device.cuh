// What the CUDA kernels share: thread counts, loads, and sums over a block in a fixed order.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/operands.h"
#include "core/tiles.h"
#include "cuda/primitives.cuh"

// Returns the error of a call from the function that makes it.
#define GHOSTGRAD_TRY(CALL)                                                 \
  do {                                                                      \
    if (const cudaError_t error = CALL; error != cudaSuccess) return error; \
  } while (false)

namespace ghostgrad::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// As many blocks as there are units of work, up to what a grid can have; kernels stride over the rest.
inline int grid_for(int64_t units) { return static_cast<int>(core::minimum(units, int64_t{1} << 30)); }

// The sum of `value` over the warp, in its first lane: a tree over lanes.
__device__ __forceinline__ double warp_sum(double value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
}

// ... and to the warp's place in `partial`.
__device__ __forceinline__ void write_warp_sum(double value, double* __restrict__ partial) {  // (kWarps,)
  const double total = warp_sum(value);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = total;
}

// The sum of `value` over the block, in thread 0. The order is that of a tree over lanes and then warps: always the
// same. All threads of the block must call it; it may be called again at once.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double warp_sums[kWarps];
  write_warp_sum(value, warp_sums);
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[warp];
  }
  __syncthreads();  // nobody overwrites warp_sums before thread 0 has read it
  return total;
}

}  // namespace
}  // namespace ghostgrad::cuda
