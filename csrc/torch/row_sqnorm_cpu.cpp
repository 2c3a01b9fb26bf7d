#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"
#include "torch/check.h"
#include "torch/parallel_cpu.h"

namespace ghostgrad::binding {
namespace {

Tensor row_sqnorm_cpu(const Tensor& x) {  // (B, ...)
  const CheckedRows checked = checked_rows("row_sqnorm", x);
  Tensor sqnorm = ::torch::stable::new_empty(x, {x.size(0)}, accumulation_type(checked.rows.dtype));
  cpu::row_sqnorm(checked.rows, sqnorm.mutable_data_ptr(), torch_threads(), cpu::capability());
  return sqnorm;  // (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CPU, m) { m.impl("row_sqnorm", TORCH_BOX(&ghostgrad::binding::row_sqnorm_cpu)); }
