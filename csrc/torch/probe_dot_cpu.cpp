#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"
#include "torch/noise.h"
#include "torch/parallel_cpu.h"

namespace ghostgrad::binding {
namespace {

Tensor probe_dot_cpu(Tensors plus, std::optional<Tensors> minus, int64_t seed, double sigma, std::string distribution,
                     std::optional<Integers> blocks) {
  return probe_dot(plus, minus, seed, sigma, distribution, blocks,
                   [](auto... operands) { cpu::probe_dot(operands..., torch_threads(), cpu::capability()); });
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CPU, m) { m.impl("probe_dot", TORCH_BOX(&ghostgrad::binding::probe_dot_cpu)); }
