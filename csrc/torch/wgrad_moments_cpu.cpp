#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/ops.h"
#include "torch/check.h"
#include "torch/parallel_cpu.h"

namespace ghostgrad::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor> wgrad_moments_cpu(const Tensor& a,    // (B, T, p)
                                                     const Tensor& b) {  // (B, T, d)
  const CheckedOperands checked = checked_operands("wgrad_moments", a, b);
  const ScalarType wide = accumulation_type(checked.operands.dtype);
  Tensor wgrad = ::torch::stable::new_empty(a, {b.size(2), a.size(2)}, a.scalar_type());
  Tensor squares = ::torch::stable::new_empty(a, {b.size(2), a.size(2)}, wide);
  Tensor sqnorm = ::torch::stable::new_empty(a, {a.size(0)}, wide);
  cpu::wgrad_moments(checked.operands, wgrad.mutable_data_ptr(), squares.mutable_data_ptr(), sqnorm.mutable_data_ptr(),
                     torch_threads(), cpu::capability());
  return {wgrad, squares, sqnorm};  // (d, p), (d, p), (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CPU, m) {
  m.impl("wgrad_moments", TORCH_BOX(&ghostgrad::binding::wgrad_moments_cpu));
}
