#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/operands.h"

namespace ghostgrad::cuda {

// Bytes of device memory that launch_wgrad_moments works in.
int64_t wgrad_moments_workspace(const core::Operands& operands);

// wgrad = sum_i b_i^T a_i, squares = sum_i (b_i^T a_i)^2 element by element and sqnorm[i] = ||b_i^T a_i||^2, in one
// pass. Returns the first error that CUDA reports; sizes may be zero.
cudaError_t launch_wgrad_moments(const core::Operands& operands,
                                 void* wgrad,      // (d, p) in the operands' own dtype
                                 void* squares,    // (d, p) in the accumulation type
                                 void* sqnorm,     // (B,) in the accumulation type
                                 void* workspace,  // wgrad_moments_workspace(operands) bytes, aligned to 8
                                 cudaStream_t stream);

}  // namespace ghostgrad::cuda
