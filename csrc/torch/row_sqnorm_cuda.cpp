#include "cuda/row_sqnorm.h"

#include <torch/csrc/stable/library.h>

#include "torch/launch_cuda.h"

namespace ghostgrad::binding {
namespace {

Tensor row_sqnorm_cuda(const Tensor& x) {  // (B, ...)
  const CheckedRows checked = checked_rows("row_sqnorm", x);
  const CudaContext context(x);
  Tensor sqnorm = ::torch::stable::new_empty(x, {x.size(0)}, accumulation_type(checked.rows.dtype));
  Tensor workspace = workspace_like(x, cuda::row_sqnorm_workspace(checked.rows));
  check_launch("row_sqnorm", cuda::launch_row_sqnorm(checked.rows, sqnorm.mutable_data_ptr(),
                                                     workspace.mutable_data_ptr(), context.stream()));
  return sqnorm;  // (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CUDA, m) { m.impl("row_sqnorm", TORCH_BOX(&ghostgrad::binding::row_sqnorm_cuda)); }
