#include "cuda/wgrad_moments.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/launch_cuda.h"

namespace ghostgrad::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor> wgrad_moments_cuda(const Tensor& a,    // (B, T, p)
                                                      const Tensor& b) {  // (B, T, d)
  const CheckedOperands checked = checked_operands("wgrad_moments", a, b);
  const core::Operands operands = as_set(checked.operands);
  check_countable("wgrad_moments", operands);
  const CudaContext context(a);
  const ScalarType wide = accumulation_type(operands.dtype);
  Tensor wgrad = ::torch::stable::new_empty(a, {b.size(2), a.size(2)}, a.scalar_type());
  Tensor squares = ::torch::stable::new_empty(a, {b.size(2), a.size(2)}, wide);
  Tensor sqnorm = ::torch::stable::new_empty(a, {a.size(0)}, wide);
  Tensor workspace = workspace_like(a, cuda::wgrad_moments_workspace(operands));
  check_launch("wgrad_moments",
               cuda::launch_wgrad_moments(operands, wgrad.mutable_data_ptr(), squares.mutable_data_ptr(),
                                          sqnorm.mutable_data_ptr(), workspace.mutable_data_ptr(), context.stream()));
  return {wgrad, squares, sqnorm};  // (d, p), (d, p), (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CUDA, m) {
  m.impl("wgrad_moments", TORCH_BOX(&ghostgrad::binding::wgrad_moments_cuda));
}
