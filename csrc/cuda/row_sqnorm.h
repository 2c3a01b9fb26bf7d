#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/operands.h"

namespace ghostgrad::cuda {

// Bytes of device memory that launch_row_sqnorm works in.
int64_t row_sqnorm_workspace(const core::Rows& rows);

// sqnorm[i] = sum_j x[i, j]^2. Returns the first error that CUDA reports; sizes may be zero.
cudaError_t launch_row_sqnorm(const core::Rows& rows,
                              void* sqnorm,     // (B,) in the accumulation type
                              void* workspace,  // row_sqnorm_workspace(rows) bytes, aligned to 8
                              cudaStream_t stream);

}  // namespace ghostgrad::cuda
