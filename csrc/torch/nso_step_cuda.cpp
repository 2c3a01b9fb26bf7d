#include "cuda/nso_step.h"

#include <torch/csrc/stable/library.h>

#include "torch/launch_cuda.h"
#include "torch/noise.h"

namespace ghostgrad::binding {
namespace {

void nso_step_cuda(Tensors params, Tensors grads, Tensors centre, Tensors momenta, double lr, double mix,
                   int64_t passes, double momentum, double dampening, double weight_decay, bool nesterov, bool first) {
  if (params.empty()) return;
  const CudaContext context(params[0]);
  nso_step(params, grads, centre, momenta,
           core::NsoStep{lr, mix, passes, momentum, dampening, weight_decay, nesterov, first},
           [&](auto... operands) { check_launch("nso_step_", cuda::launch_nso_step(operands..., context.stream())); });
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CUDA, m) { m.impl("nso_step_", TORCH_BOX(&ghostgrad::binding::nso_step_cuda)); }
