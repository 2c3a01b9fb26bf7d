#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/ops.h"
#include "torch/check.h"
#include "torch/parallel_cpu.h"

namespace ghostgrad::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_affine_cpu(const Tensor& b,                 // (B, T, d, S)
                                                                   const Tensor& x,                 // (B, T, d, S)
                                                                   const Tensor& mean,              // (B, T, G)
                                                                   const Tensor& rstd,              // (B, T, G)
                                                                   std::optional<Tensor> weight) {  // (d,)
  const CheckedNormalisation checked = checked_normalisation("norm_affine", b, x, mean, rstd, weight);
  const AffineOutputs outputs(checked.affine, /*total=*/true);
  cpu::norm_affine(checked.normalisation, outputs.results(), torch_threads(), cpu::capability());
  return std::tuple_cat(std::tuple(checked.gradient), outputs.tensors);  // (B, T, d, S), (d,), (B,), (d,), (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CPU, m) { m.impl("norm_affine", TORCH_BOX(&ghostgrad::binding::norm_affine_cpu)); }
