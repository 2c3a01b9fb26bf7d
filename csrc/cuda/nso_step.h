#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/nso.h"
#include "core/sections.h"

namespace ghostgrad::cuda {

// The mean of the perturbed gradients mixed with the centre's, and the step of SGD, for `count` tensors of one dtype.
// Returns the first error that CUDA reports; sizes may be zero.
cudaError_t launch_nso_step(core::DType dtype, const core::Section* sections,  // (count,)
                            const core::NsoTensor* tensors,                    // (count,)
                            int64_t count, const core::NsoStep& step, cudaStream_t stream);

}  // namespace ghostgrad::cuda
