#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/operands.h"

namespace ghostgrad::cuda {

// Bytes of device memory that launch_affine_sqnorm works in.
int64_t affine_sqnorm_workspace(const core::Affine& affine);

// With g_i = sum_{t,s} b[i, t, :, s] (x[i, t, :, s] - mean) rstd for the scale, and without that factor for the shift:
// sum_i g_i and ||g_i||^2 of both. Returns the first error that CUDA reports; sizes may be zero.
cudaError_t launch_affine_sqnorm(const core::Affine& affine, const core::AffineResults& results,
                                 void* workspace,  // affine_sqnorm_workspace(affine) bytes, aligned to 8
                                 cudaStream_t stream);

}  // namespace ghostgrad::cuda
