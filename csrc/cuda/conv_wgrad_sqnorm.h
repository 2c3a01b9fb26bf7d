#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/operands.h"

namespace ghostgrad::cuda {

// Bytes of device memory that launch_conv_wgrad_sqnorm works in.
int64_t conv_wgrad_sqnorm_workspace(const core::Convolution& convolution);

// wgrad = sum_i G_i of a convolution's weight and sqnorm[i] = ||G_i||^2, in one pass. Returns the first error that CUDA
// reports; sizes may be zero.
cudaError_t launch_conv_wgrad_sqnorm(const core::Convolution& convolution,
                                     void* wgrad,      // (out_channels, channels / groups, *kernel)
                                     void* sqnorm,     // (B,) in the accumulation type
                                     void* workspace,  // conv_wgrad_sqnorm_workspace(convolution) bytes, aligned to 8
                                     cudaStream_t stream);

}  // namespace ghostgrad::cuda
