#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"
#include "torch/noise.h"
#include "torch/parallel_cpu.h"

namespace ghostgrad::binding {
namespace {

void nso_step_cpu(Tensors params, Tensors grads, Tensors centre, Tensors momenta, double lr, double mix, int64_t passes,
                  double momentum, double dampening, double weight_decay, bool nesterov, bool first) {
  nso_step(params, grads, centre, momenta,
           core::NsoStep{lr, mix, passes, momentum, dampening, weight_decay, nesterov, first},
           [](auto... operands) { cpu::nso_step(operands..., torch_threads(), cpu::capability()); });
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CPU, m) { m.impl("nso_step_", TORCH_BOX(&ghostgrad::binding::nso_step_cpu)); }
