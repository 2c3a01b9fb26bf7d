#include "cuda/second_difference.h"

#include <torch/csrc/stable/library.h>

#include "torch/launch_cuda.h"
#include "torch/noise.h"

namespace ghostgrad::binding {
namespace {

Tensor second_difference_cuda(const Tensor& plus,   // (B,)
                              const Tensor& zero,   // (B,)
                              const Tensor& minus,  // (B,)
                              double sigma) {
  const CudaContext context(plus);
  return second_difference(plus, zero, minus, sigma, [&](auto... operands) {
    check_launch("second_difference", cuda::launch_second_difference(operands..., context.stream()));
  });  // (B,)
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CUDA, m) {
  m.impl("second_difference", TORCH_BOX(&ghostgrad::binding::second_difference_cuda));
}
