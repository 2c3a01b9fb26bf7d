#include "cuda/norm_affine.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "torch/launch_cuda.h"

namespace ghostgrad::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_affine_cuda(const Tensor& b,                 // (B, T, d, S)
                                                                    const Tensor& x,                 // (B, T, d, S)
                                                                    const Tensor& mean,              // (B, T, G)
                                                                    const Tensor& rstd,              // (B, T, G)
                                                                    std::optional<Tensor> weight) {  // (d,)
  const CudaContext context(b);
  const CheckedNormalisation checked = checked_normalisation("norm_affine", b, x, mean, rstd, weight);
  check_countable("norm_affine", checked.affine.affine);
  const AffineOutputs outputs(checked.affine, /*total=*/true);
  Tensor workspace = workspace_like(b, cuda::norm_affine_workspace(checked.normalisation));
  check_launch("norm_affine", cuda::launch_norm_affine(checked.normalisation, outputs.results(),
                                                       workspace.mutable_data_ptr(), context.stream()));
  return std::tuple_cat(std::tuple(checked.gradient), outputs.tensors);  // (B, T, d, S), (d,), (B,), (d,), (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CUDA, m) {
  m.impl("norm_affine", TORCH_BOX(&ghostgrad::binding::norm_affine_cuda));
}
