#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/ops.h"
#include "torch/check.h"
#include "torch/parallel_cpu.h"

namespace ghostgrad::binding {
namespace {

std::tuple<Tensor, Tensor> conv_wgrad_sqnorm_cpu(const Tensor& x,  // (B, R, c, *size)
                                                 const Tensor& b,  // (B, R, d, *out)
                                                 const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                                                 const std::vector<int64_t>& padding,
                                                 const std::vector<int64_t>& dilation, int64_t groups) {
  const ConvArguments arguments{kernel, stride, padding, dilation, groups};
  const CheckedConvolution checked = checked_convolution("conv_wgrad_sqnorm", x, b, arguments);
  Tensor wgrad = ::torch::stable::new_empty(x, weight_shape(checked.convolution, arguments), x.scalar_type());
  Tensor sqnorm = ::torch::stable::new_empty(x, {x.size(0)}, accumulation_type(checked.convolution.dtype));
  cpu::conv_wgrad_sqnorm(checked.convolution, wgrad.mutable_data_ptr(), sqnorm.mutable_data_ptr(), torch_threads(),
                         cpu::capability());
  return {wgrad, sqnorm};  // (d, c / groups, *kernel), (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CPU, m) {
  m.impl("conv_wgrad_sqnorm", TORCH_BOX(&ghostgrad::binding::conv_wgrad_sqnorm_cpu));
}
