#include "cuda/embedding_sqnorm.h"

#include <torch/csrc/stable/library.h>

#include "torch/launch_cuda.h"

namespace ghostgrad::binding {
namespace {

Tensor embedding_sqnorm_cuda(const Tensor& index,  // (B, T)
                             const Tensor& b) {    // (B, T, d)
  const CheckedPicks checked = checked_picks("embedding_sqnorm", index, b);
  const CudaContext context(b);
  Tensor sqnorm = ::torch::stable::new_empty(b, {b.size(0)}, accumulation_type(checked.picks.dtype));
  Tensor workspace = workspace_like(b, cuda::embedding_sqnorm_workspace(checked.picks));
  check_launch("embedding_sqnorm", cuda::launch_embedding_sqnorm(checked.picks, sqnorm.mutable_data_ptr(),
                                                                 workspace.mutable_data_ptr(), context.stream()));
  return sqnorm;  // (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CUDA, m) {
  m.impl("embedding_sqnorm", TORCH_BOX(&ghostgrad::binding::embedding_sqnorm_cuda));
}
