#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/operands.h"

namespace ghostgrad::cuda {

// Bytes of device memory that launch_norm_affine works in.
int64_t norm_affine_workspace(const core::Normalisation& normalisation);

// With x^ = (x - mean) rstd and <.> the mean over a group of channels and the positions after them: the gradient of x,
// rstd (w b - <w b> - x^ <w b x^>), and what launch_affine_sqnorm gives. Returns the first error that CUDA reports;
// sizes may be zero.
cudaError_t launch_norm_affine(const core::Normalisation& normalisation, const core::AffineResults& results,
                               void* workspace,  // norm_affine_workspace(normalisation) bytes, aligned to 8
                               cudaStream_t stream);

}  // namespace ghostgrad::cuda
