// wgrad_moments on the CPU: sum_i G_i, sum_i G_i^2 element by element and all ||G_i||^2 from one pass (wgrad_runs.h).
#include "core/storage.h"
#include "cpu/isa.h"
#include "cpu/wgrad_runs.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

template <class S, class A = core::accumulation_t<S>>
void run(const core::Operands& o, void* wgrad, void* squares, void* sqnorm, ParallelFor parallel) {
  sum_over_samples<S, Sums::kMoments>(o, nullptr, static_cast<S*>(wgrad), static_cast<A*>(squares),
                                      static_cast<A*>(sqnorm), parallel);
}

}  // namespace

void wgrad_moments(const core::Operands& operands, void* wgrad, void* squares, void* sqnorm, ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(operands.dtype, run, operands, wgrad, squares, sqnorm, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
