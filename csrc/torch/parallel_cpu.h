// PyTorch's thread pool in the shape that the CPU kernels ask for.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace ghostgrad::binding {

inline cpu::ParallelFor torch_threads() {
  return cpu::ParallelFor{[](int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    ::torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
  }};
}

}  // namespace ghostgrad::binding
