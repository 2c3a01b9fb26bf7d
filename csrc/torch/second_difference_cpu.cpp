#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"
#include "torch/noise.h"
#include "torch/parallel_cpu.h"

namespace ghostgrad::binding {
namespace {

Tensor second_difference_cpu(const Tensor& plus,   // (B,)
                             const Tensor& zero,   // (B,)
                             const Tensor& minus,  // (B,)
                             double sigma) {
  return second_difference(plus, zero, minus, sigma, [](auto... operands) {
    cpu::second_difference(operands..., torch_threads(), cpu::capability());
  });  // (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CPU, m) {
  m.impl("second_difference", TORCH_BOX(&ghostgrad::binding::second_difference_cpu));
}
