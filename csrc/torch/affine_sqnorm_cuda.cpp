#include "cuda/affine_sqnorm.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "torch/launch_cuda.h"

namespace ghostgrad::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> affine_sqnorm_cuda(const Tensor& b,             // (B, T, d, S)
                                                              std::optional<Tensor> x,     // (B, T, d, S)
                                                              std::optional<Tensor> mean,  // (B, T, G)
                                                              std::optional<Tensor> rstd,  // (B, T, G)
                                                              bool total) {
  const CheckedAffine checked = checked_affine("affine_sqnorm", b, x, mean, rstd);
  check_countable("affine_sqnorm", checked.affine);
  const CudaContext context(b);
  const AffineOutputs outputs(checked, total);
  Tensor workspace = workspace_like(b, cuda::affine_sqnorm_workspace(checked.affine));
  check_launch("affine_sqnorm", cuda::launch_affine_sqnorm(checked.affine, outputs.results(),
                                                           workspace.mutable_data_ptr(), context.stream()));
  return outputs.tensors;  // (d,), (B,), (d,), (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CUDA, m) {
  m.impl("affine_sqnorm", TORCH_BOX(&ghostgrad::binding::affine_sqnorm_cuda));
}
