#include "cuda/probe_dot.h"

#include <torch/csrc/stable/library.h>

#include "torch/launch_cuda.h"
#include "torch/noise.h"

namespace ghostgrad::binding {
namespace {

Tensor probe_dot_cuda(Tensors plus, std::optional<Tensors> minus, int64_t seed, double sigma, std::string distribution,
                      std::optional<Integers> blocks) {
  check(!plus.empty(), "probe_dot: plus must have at least one tensor");
  const CudaContext context(plus[0]);
  return probe_dot(
      plus, minus, seed, sigma, distribution, blocks,
      [&](core::DType dtype, const core::Section* sections, const void* const* of_plus, const void* const* of_minus,
          int64_t count, const core::Noise& noise, double scale, double* dots) {
        Tensor workspace = workspace_like(plus[0], cuda::probe_dot_workspace(sections, count));
        check_launch("probe_dot", cuda::launch_probe_dot(dtype, sections, of_plus, of_minus, count, noise, scale, dots,
                                                         workspace.mutable_data_ptr(), context.stream()));
      });
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CUDA, m) { m.impl("probe_dot", TORCH_BOX(&ghostgrad::binding::probe_dot_cuda)); }
