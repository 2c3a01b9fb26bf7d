#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/operands.h"

namespace ghostgrad::cuda {

// Bytes of device memory that launch_outer_sqnorm works in.
int64_t outer_sqnorm_workspace(const core::Operands& operands);

// sqnorm[i] = ||b_i^T a_i||^2, tile by tile. Returns the first error that CUDA reports; sizes may be zero.
cudaError_t launch_outer_sqnorm(const core::Operands& operands,
                                void* sqnorm,     // (B,) in the accumulation type
                                void* workspace,  // outer_sqnorm_workspace(operands) bytes, aligned to 8
                                cudaStream_t stream);

}  // namespace ghostgrad::cuda
