#include "cuda/outer_sqnorm.h"

#include <torch/csrc/stable/library.h>

#include "torch/launch_cuda.h"

namespace ghostgrad::binding {
namespace {

Tensor outer_sqnorm_cuda(const Tensor& a,    // (B, T, p)
                         const Tensor& b) {  // (B, T, d)
  const CheckedOperands checked = checked_operands("outer_sqnorm", a, b);
  const core::Operands operands = as_set(checked.operands);
  check_countable("outer_sqnorm", operands);
  const CudaContext context(a);
  Tensor sqnorm = ::torch::stable::new_empty(a, {a.size(0)}, accumulation_type(operands.dtype));
  Tensor workspace = workspace_like(a, cuda::outer_sqnorm_workspace(operands));
  check_launch("outer_sqnorm", cuda::launch_outer_sqnorm(operands, sqnorm.mutable_data_ptr(),
                                                         workspace.mutable_data_ptr(), context.stream()));
  return sqnorm;  // (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CUDA, m) {
  m.impl("outer_sqnorm", TORCH_BOX(&ghostgrad::binding::outer_sqnorm_cuda));
}
