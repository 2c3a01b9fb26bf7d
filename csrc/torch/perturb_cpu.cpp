#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"
#include "torch/noise.h"
#include "torch/parallel_cpu.h"

namespace ghostgrad::binding {
namespace {

void perturb_cpu(Tensors params, int64_t seed, double sigma, std::string distribution, std::optional<Integers> blocks) {
  perturb(params, seed, sigma, distribution, blocks,
          [](auto... operands) { cpu::perturb(operands..., torch_threads(), cpu::capability()); });
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CPU, m) { m.impl("perturb_", TORCH_BOX(&ghostgrad::binding::perturb_cpu)); }
