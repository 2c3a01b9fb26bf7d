#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/noise.h"
#include "core/sections.h"

namespace ghostgrad::cuda {

// Bytes of device memory that launch_probe_dot works in.
int64_t probe_dot_workspace(const core::Section* sections, int64_t count);

// dots[slot] = sum_i xi_i (plus_i - minus_i) / (2 sigma) over each of `count` tensors of one dtype. Returns the first
// error that CUDA reports; sizes may be zero.
cudaError_t launch_probe_dot(core::DType dtype, const core::Section* sections,  // (count,)
                             const void* const* plus,                           // (count,)
                             const void* const* minus,                          // (count,), or null for zeros
                             int64_t count, const core::Noise& noise, double sigma, double* dots,
                             void* workspace,  // probe_dot_workspace(sections, count) bytes, aligned to 8
                             cudaStream_t stream);

}  // namespace ghostgrad::cuda
