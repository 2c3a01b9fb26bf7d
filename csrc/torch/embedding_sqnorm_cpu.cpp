#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"
#include "torch/check.h"
#include "torch/parallel_cpu.h"

namespace ghostgrad::binding {
namespace {

Tensor embedding_sqnorm_cpu(const Tensor& index,  // (B, T)
                            const Tensor& b) {    // (B, T, d)
  const CheckedPicks checked = checked_picks("embedding_sqnorm", index, b);
  Tensor sqnorm = ::torch::stable::new_empty(b, {b.size(0)}, accumulation_type(checked.picks.dtype));
  cpu::embedding_sqnorm(checked.picks, sqnorm.mutable_data_ptr(), torch_threads(), cpu::capability());
  return sqnorm;  // (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CPU, m) {
  m.impl("embedding_sqnorm", TORCH_BOX(&ghostgrad::binding::embedding_sqnorm_cpu));
}
