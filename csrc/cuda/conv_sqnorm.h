#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/operands.h"

namespace ghostgrad::cuda {

// Bytes of device memory that launch_conv_sqnorm works in.
int64_t conv_sqnorm_workspace(const core::Convolution& convolution);

// sqnorm[i] = ||G_i||^2 of a convolution's weight. Returns the first error that CUDA reports; sizes may be zero.
cudaError_t launch_conv_sqnorm(const core::Convolution& convolution,
                               void* sqnorm,     // (B,) in the accumulation type
                               void* workspace,  // conv_sqnorm_workspace(convolution) bytes, aligned to 8
                               cudaStream_t stream);

}  // namespace ghostgrad::cuda
