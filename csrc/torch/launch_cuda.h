// What every CUDA binding does around a launch: device, stream, working memory, and the error put into words.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "core/tiles.h"
#include "module.h"
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

// The operands of a product as the user wants float32 to be multiplied.
inline core::Operands as_set(core::Operands operands) {
  operands.tf32 = operands.dtype == core::DType::kFloat32 && tf32_in_matmul();
  return operands;
}
inline core::Convolution as_set(core::Convolution convolution) {
  convolution.tf32 = convolution.dtype == core::DType::kFloat32 && tf32_in_conv();
  return convolution;
}

// x (B, R, channels, *size) with the channels adjacent in memory, where kernels read them 16 bytes at a time: a copy if
// they are not, and if those of a group fill such pieces.
inline Tensor channels_last(Tensor x, int64_t groups) {
  const int64_t element = x.element_size();
  if (groups < 1 || x.dim() < 4 || x.stride(2) == 1 || x.size(2) / groups * element % 16 != 0) return x;
  for (int64_t dim = 2; dim + 1 < x.dim(); ++dim) x = ::torch::stable::transpose(x, dim, dim + 1);
  x = ::torch::stable::contiguous(x);
  for (int64_t dim = x.dim() - 1; dim > 2; --dim) x = ::torch::stable::transpose(x, dim - 1, dim);
  return x;
}

// Working memory from PyTorch's allocator, which keeps it from being reused before the stream is done with it.
inline Tensor workspace_like(const Tensor& tensor, int64_t bytes) {
  return ::torch::stable::new_empty(tensor, {core::ceil_div(bytes, 8)}, ScalarType::Double);
}

inline void check_launch(const char* op, cudaError_t error) {
  check(error == cudaSuccess, op, ": the CUDA kernel did not start: ", cudaGetErrorName(error), ", ",
        cudaGetErrorString(error));
}

}  // namespace ghostgrad::binding
