#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/ops.h"
#include "torch/check.h"
#include "torch/parallel_cpu.h"

namespace ghostgrad::binding {
namespace {

std::tuple<Tensor, Tensor> wgrad_sqnorm_cpu(const Tensor& a,                  // (B, T, p)
                                            const Tensor& b,                  // (B, T, d)
                                            std::optional<Tensor> weights) {  // (B,)
  const CheckedOperands checked = checked_operands("wgrad_sqnorm", a, b);
  if (weights.has_value()) weights = checked_weights("wgrad_sqnorm", a, *weights);
  Tensor wgrad = ::torch::stable::new_empty(a, {b.size(2), a.size(2)}, a.scalar_type());
  Tensor sqnorm = ::torch::stable::new_empty(a, {a.size(0)}, accumulation_type(checked.operands.dtype));
  cpu::wgrad_sqnorm(checked.operands, weights.has_value() ? weights->const_data_ptr() : nullptr,
                    wgrad.mutable_data_ptr(), sqnorm.mutable_data_ptr(), torch_threads(), cpu::capability());
  return {wgrad, sqnorm};  // (d, p), (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CPU, m) {
  m.impl("wgrad_sqnorm", TORCH_BOX(&ghostgrad::binding::wgrad_sqnorm_cpu));
}
