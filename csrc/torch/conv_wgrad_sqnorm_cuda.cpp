#include "cuda/conv_wgrad_sqnorm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "torch/launch_cuda.h"

namespace ghostgrad::binding {
namespace {

std::tuple<Tensor, Tensor> conv_wgrad_sqnorm_cuda(const Tensor& x,  // (B, R, c, *size)
                                                  const Tensor& b,  // (B, R, d, *out)
                                                  const std::vector<int64_t>& kernel,
                                                  const std::vector<int64_t>& stride,
                                                  const std::vector<int64_t>& padding,
                                                  const std::vector<int64_t>& dilation, int64_t groups) {
  const ConvArguments arguments{kernel, stride, padding, dilation, groups};
  const CheckedConvolution checked =
      checked_convolution("conv_wgrad_sqnorm", channels_last(x, groups), channels_last(b, groups), arguments);
  const core::Convolution convolution = as_set(checked.convolution);
  check_countable("conv_wgrad_sqnorm", convolution);
  const CudaContext context(x);
  Tensor wgrad = ::torch::stable::new_empty(x, weight_shape(convolution, arguments), x.scalar_type());
  Tensor sqnorm = ::torch::stable::new_empty(x, {x.size(0)}, accumulation_type(convolution.dtype));
  Tensor workspace = workspace_like(x, cuda::conv_wgrad_sqnorm_workspace(convolution));
  check_launch("conv_wgrad_sqnorm",
               cuda::launch_conv_wgrad_sqnorm(convolution, wgrad.mutable_data_ptr(), sqnorm.mutable_data_ptr(),
                                              workspace.mutable_data_ptr(), context.stream()));
  return {wgrad, sqnorm};  // (d, c / groups, *kernel), (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CUDA, m) {
  m.impl("conv_wgrad_sqnorm", TORCH_BOX(&ghostgrad::binding::conv_wgrad_sqnorm_cuda));
}
