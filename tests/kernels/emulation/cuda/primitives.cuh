// csrc/cuda/primitives.cuh for the CPU: the same declarations over the emulation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"

namespace ghostgrad::cuda {

struct Launch {
  int blocks;
  int threads;
  int shared_bytes = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& shape, cudaStream_t stream,
                   const Arguments&... arguments) {
  emulation::launch(stream, shape.blocks, shape.threads, kernel, arguments...);
  return cudaSuccess;
}

}  // namespace ghostgrad::cuda
