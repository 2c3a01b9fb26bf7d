#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"
#include "torch/check.h"
#include "torch/parallel_cpu.h"

namespace ghostgrad::binding {
namespace {

Tensor outer_sqnorm_cpu(const Tensor& a,    // (B, T, p)
                        const Tensor& b) {  // (B, T, d)
  const CheckedOperands checked = checked_operands("outer_sqnorm", a, b);
  Tensor sqnorm = ::torch::stable::new_empty(a, {a.size(0)}, accumulation_type(checked.operands.dtype));
  cpu::outer_sqnorm(checked.operands, sqnorm.mutable_data_ptr(), torch_threads(), cpu::capability());
  return sqnorm;  // (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CPU, m) {
  m.impl("outer_sqnorm", TORCH_BOX(&ghostgrad::binding::outer_sqnorm_cpu));
}
