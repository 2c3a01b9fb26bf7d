#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/operands.h"

namespace ghostgrad::cuda {

// Bytes of device memory that launch_gram_sqnorm works in.
int64_t gram_sqnorm_workspace(const core::Operands& operands);

// sqnorm[i] = sum_{s,t} <a_is, a_it> <b_is, b_it>. Returns the first error that CUDA reports; sizes may be zero.
cudaError_t launch_gram_sqnorm(const core::Operands& operands,
                               void* sqnorm,     // (B,) in the accumulation type
                               void* workspace,  // gram_sqnorm_workspace(operands) bytes, aligned to 8
                               cudaStream_t stream);

}  // namespace ghostgrad::cuda
