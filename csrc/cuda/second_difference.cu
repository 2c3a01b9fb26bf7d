// second_difference on CUDA: a thread for each sample.
#include "cuda/second_difference.h"

#include "core/second_difference.h"
#include "core/storage.h"
#include "cuda/device.cuh"

namespace ghostgrad::cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(kThreads)
    second_difference_kernel(const S* __restrict__ plus,                                       // (count,)
                             const S* __restrict__ zero,                                       // (count,)
                             const S* __restrict__ minus,                                      // (count,)
                             int64_t count, double sigma, double* __restrict__ differences) {  // (count,)
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += threads) {
    differences[i] = core::second_difference(static_cast<double>(core::to_accumulation(plus[i])),
                                             static_cast<double>(core::to_accumulation(zero[i])),
                                             static_cast<double>(core::to_accumulation(minus[i])), sigma);
  }
}

template <class S>
cudaError_t run(const void* plus, const void* zero, const void* minus, int64_t count, double sigma, double* differences,
                cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return launch(second_difference_kernel<S>, Launch{grid_for(core::ceil_div(count, kThreads)), kThreads}, stream,
                static_cast<const S*>(plus), static_cast<const S*>(zero), static_cast<const S*>(minus), count, sigma,
                differences);
}

}  // namespace

cudaError_t launch_second_difference(core::DType dtype, const void* plus, const void* zero, const void* minus,
                                     int64_t count, double sigma, double* differences, cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(dtype, run, plus, zero, minus, count, sigma, differences, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
