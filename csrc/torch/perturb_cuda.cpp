#include "cuda/perturb.h"

#include <torch/csrc/stable/library.h>

#include "torch/launch_cuda.h"
#include "torch/noise.h"

namespace ghostgrad::binding {
namespace {

void perturb_cuda(Tensors params, int64_t seed, double sigma, std::string distribution,
                  std::optional<Integers> blocks) {
  if (params.empty()) return;
  const CudaContext context(params[0]);
  perturb(params, seed, sigma, distribution, blocks,
          [&](auto... operands) { check_launch("perturb_", cuda::launch_perturb(operands..., context.stream())); });
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CUDA, m) { m.impl("perturb_", TORCH_BOX(&ghostgrad::binding::perturb_cuda)); }
