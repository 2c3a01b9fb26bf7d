#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/noise.h"
#include "core/sections.h"

namespace ghostgrad::cuda {

// w <- w + sigma * xi for `count` tensors of one dtype. Returns the first error that CUDA reports; sizes may be zero.
cudaError_t launch_perturb(core::DType dtype, const core::Section* sections,  // (count,)
                           void* const* params,                               // (count,)
                           int64_t count, const core::Noise& noise, double sigma, cudaStream_t stream);

}  // namespace ghostgrad::cuda
