#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/ops.h"
#include "torch/check.h"
#include "torch/parallel_cpu.h"

namespace ghostgrad::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> affine_sqnorm_cpu(const Tensor& b,             // (B, T, d, S)
                                                             std::optional<Tensor> x,     // (B, T, d, S)
                                                             std::optional<Tensor> mean,  // (B, T, G)
                                                             std::optional<Tensor> rstd,  // (B, T, G)
                                                             bool total) {
  const CheckedAffine checked = checked_affine("affine_sqnorm", b, x, mean, rstd);
  const AffineOutputs outputs(checked, total);
  cpu::affine_sqnorm(checked.affine, outputs.results(), torch_threads(), cpu::capability());
  return outputs.tensors;  // (d,), (B,), (d,), (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CPU, m) {
  m.impl("affine_sqnorm", TORCH_BOX(&ghostgrad::binding::affine_sqnorm_cpu));
}
