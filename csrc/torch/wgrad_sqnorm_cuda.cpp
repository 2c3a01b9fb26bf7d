#include "cuda/wgrad_sqnorm.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "torch/launch_cuda.h"

namespace ghostgrad::binding {
namespace {

std::tuple<Tensor, Tensor> wgrad_sqnorm_cuda(const Tensor& a,                  // (B, T, p)
                                             const Tensor& b,                  // (B, T, d)
                                             std::optional<Tensor> weights) {  // (B,)
  const CheckedOperands checked = checked_operands("wgrad_sqnorm", a, b);
  const core::Operands operands = as_set(checked.operands);
  check_countable("wgrad_sqnorm", operands);
  const CudaContext context(a);
  if (weights.has_value()) weights = checked_weights("wgrad_sqnorm", a, *weights);
  Tensor wgrad = ::torch::stable::new_empty(a, {b.size(2), a.size(2)}, a.scalar_type());
  Tensor sqnorm = ::torch::stable::new_empty(a, {a.size(0)}, accumulation_type(operands.dtype));
  Tensor workspace = workspace_like(a, cuda::wgrad_sqnorm_workspace(operands));
  check_launch("wgrad_sqnorm",
               cuda::launch_wgrad_sqnorm(operands, weights.has_value() ? weights->const_data_ptr() : nullptr,
                                         wgrad.mutable_data_ptr(), sqnorm.mutable_data_ptr(),
                                         workspace.mutable_data_ptr(), context.stream()));
  return {wgrad, sqnorm};  // (d, p), (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CUDA, m) {
  m.impl("wgrad_sqnorm", TORCH_BOX(&ghostgrad::binding::wgrad_sqnorm_cuda));
}
