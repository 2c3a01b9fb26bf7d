#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/operands.h"

namespace ghostgrad::cuda {

// Bytes of device memory that launch_embedding_sqnorm works in.
int64_t embedding_sqnorm_workspace(const core::Picks& picks);

// sqnorm[i] = sum_{v >= 0} ||sum_{t: index[i, t] = v} b[i, t]||^2. Returns the first error that CUDA reports; sizes may
// be zero.
cudaError_t launch_embedding_sqnorm(const core::Picks& picks,
                                    void* sqnorm,     // (B,) in the accumulation type
                                    void* workspace,  // embedding_sqnorm_workspace(picks) bytes, aligned to 8
                                    cudaStream_t stream);

}  // namespace ghostgrad::cuda
