#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/operands.h"

namespace ghostgrad::cuda {

// Bytes of device memory that launch_wgrad_sqnorm works in.
int64_t wgrad_sqnorm_workspace(const core::Operands& operands);

// wgrad = sum_i weights[i] b_i^T a_i and sqnorm[i] = ||b_i^T a_i||^2, in one pass. Returns the first error that CUDA
// reports; sizes may be zero.
cudaError_t launch_wgrad_sqnorm(const core::Operands& operands,
                                const void* weights,  // (B,) in the accumulation type, or null for ones
                                void* wgrad,          // (d, p) in the operands' own dtype
                                void* sqnorm,         // (B,) in the accumulation type
                                void* workspace,      // wgrad_sqnorm_workspace(operands) bytes, aligned to 8
                                cudaStream_t stream);

}  // namespace ghostgrad::cuda
