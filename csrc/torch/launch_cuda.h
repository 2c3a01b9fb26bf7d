// What every CUDA binding does around a launch: device, stream, working memory, and the error put into words.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "core/tiles.h"
#include "torch/check.h"

namespace ghostgrad::binding {

// Current device is that of `tensor` for as long as this lives; `stream` is the one PyTorch would use there.
class CudaContext {
 public:
  explicit CudaContext(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream_ = static_cast<cudaStream_t>(current);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  ::torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Working memory from PyTorch's allocator, which keeps it from being reused before the stream is done with it.
inline Tensor workspace_like(const Tensor& tensor, int64_t bytes) {
  return ::torch::stable::new_empty(tensor, {core::ceil_div(bytes, 8)}, ScalarType::Double);
}

inline void check_launch(const char* op, cudaError_t error) {
  check(error == cudaSuccess, op, ": the CUDA kernel did not start: ", cudaGetErrorName(error), ", ",
        cudaGetErrorString(error));
}

}  // namespace ghostgrad::binding
