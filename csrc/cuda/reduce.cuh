// The second step of every norm: partial sums to one number per sample.
//
// A block owns one sample at a time. Its threads take the partials in strides of the block, each adding its own in
// order, and the block sums the threads' results as a tree. The order depends on `count` alone.
#pragma once

#include "cuda/device.cuh"

namespace ghostgrad::cuda {
namespace {

template <class A>
__global__ void __launch_bounds__(kThreads) add_partials(const double* __restrict__ partial,  // (B, count)
                                                         int64_t batch, int64_t count,
                                                         A* __restrict__ sqnorm) {  // (B,)
  for (int64_t sample = blockIdx.x; sample < batch; sample += gridDim.x) {
    double sum = 0.0;
    for (int64_t k = threadIdx.x; k < count; k += kThreads) sum += partial[sample * count + k];
    const double total = block_sum(sum);
    if (threadIdx.x == 0) sqnorm[sample] = static_cast<A>(total);
  }
}

template <class A>
cudaError_t launch_add_partials(const double* partial, int64_t batch, int64_t count, A* sqnorm, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  add_partials<A><<<grid_for(batch), kThreads, 0, stream>>>(partial, batch, count, sqnorm);
  return cudaGetLastError();
}

}  // namespace
}  // namespace ghostgrad::cuda
