// The second step: partial sums to one number per sample, and weight gradients of runs to one.
//
// For the norms, a block owns one sample at a time. Its threads take the partials in strides of the block, each adding
// its own in order, and the block sums the threads' results as a tree. The order depends on `count` alone.
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
  return launch(add_partials<A>, Launch{grid_for(batch), kThreads}, stream, partial, batch, count, sqnorm);
}

// A thread owns one element of the weight gradient at a time and adds its runs in order.
template <class S, class A = core::accumulation_t<S>>
__global__ void __launch_bounds__(kThreads) add_runs(const A* __restrict__ run_wgrad,  // (runs, elements)
                                                     int64_t runs, int64_t elements,
                                                     S* __restrict__ wgrad) {  // (elements,)
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < elements; e += threads) {
    double sum = 0.0;
    for (int64_t run = 0; run < runs; ++run) sum += static_cast<double>(run_wgrad[run * elements + e]);
    wgrad[e] = core::from_accumulation<S>(static_cast<A>(sum));
  }
}

template <class S, class A>
cudaError_t launch_add_runs(const A* run_wgrad, int64_t runs, int64_t elements, S* wgrad, cudaStream_t stream) {
  return launch(add_runs<S>, Launch{grid_for(core::ceil_div(elements, kThreads)), kThreads}, stream, run_wgrad, runs,
                elements, wgrad);
}

}  // namespace
}  // namespace ghostgrad::cuda
