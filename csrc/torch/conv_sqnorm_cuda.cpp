#include "cuda/conv_sqnorm.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "torch/launch_cuda.h"

namespace ghostgrad::binding {
namespace {

Tensor conv_sqnorm_cuda(const Tensor& x,  // (B, R, c, *size)
                        const Tensor& b,  // (B, R, d, *out)
                        const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  const CheckedConvolution checked = checked_convolution(
      "conv_sqnorm", channels_last(x, groups), channels_last(b, groups), {kernel, stride, padding, dilation, groups});
  const core::Convolution convolution = as_set(checked.convolution);
  check_countable("conv_sqnorm", convolution);
  const CudaContext context(x);
  Tensor sqnorm = ::torch::stable::new_empty(x, {x.size(0)}, accumulation_type(convolution.dtype));
  Tensor workspace = workspace_like(x, cuda::conv_sqnorm_workspace(convolution));
  check_launch("conv_sqnorm", cuda::launch_conv_sqnorm(convolution, sqnorm.mutable_data_ptr(),
                                                       workspace.mutable_data_ptr(), context.stream()));
  return sqnorm;  // (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CUDA, m) {
  m.impl("conv_sqnorm", TORCH_BOX(&ghostgrad::binding::conv_sqnorm_cuda));
}
