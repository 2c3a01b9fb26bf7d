#include <torch/csrc/stable/library.h>

#include <vector>

#include "core/plan.h"
#include "cpu/ops.h"
#include "torch/check.h"
#include "torch/parallel_cpu.h"

namespace ghostgrad::binding {
namespace {

Tensor conv_sqnorm_cpu(const Tensor& x,  // (B, R, c, *size)
                       const Tensor& b,  // (B, R, d, *out)
                       const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  const CheckedConvolution checked =
      checked_convolution("conv_sqnorm", x, b, {kernel, stride, padding, dilation, groups});
  const core::Convolution& o = checked.convolution;
  Tensor sqnorm = ::torch::stable::new_empty(x, {x.size(0)}, accumulation_type(o.dtype));
  const core::Plan chosen = core::conv_plan(core::ConvProblem{
      o.batch, o.positions(), o.in_features(), o.group_outputs(), groups, o.dtype, cpu::machine(), /*wgrad=*/false});
  if (chosen.norm == core::Norm::kGram) {
    cpu::conv_gram_sqnorm(o, sqnorm.mutable_data_ptr(), torch_threads(), cpu::capability());
  } else {
    cpu::conv_outer_sqnorm(o, sqnorm.mutable_data_ptr(), torch_threads(), cpu::capability());
  }
  return sqnorm;  // (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CPU, m) { m.impl("conv_sqnorm", TORCH_BOX(&ghostgrad::binding::conv_sqnorm_cpu)); }
