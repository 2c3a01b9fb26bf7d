#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"

namespace ghostgrad::cuda {

// differences[i] = (plus[i] + minus[i] - 2 zero[i]) / sigma^2. Returns the first error that CUDA reports; `count` may
// be zero.
cudaError_t launch_second_difference(core::DType dtype,
                                     const void* plus,   // (count,)
                                     const void* zero,   // (count,)
                                     const void* minus,  // (count,)
                                     int64_t count, double sigma,
                                     double* differences,  // (count,)
                                     cudaStream_t stream);

}  // namespace ghostgrad::cuda
