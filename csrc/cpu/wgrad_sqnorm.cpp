// wgrad_sqnorm on the CPU: the weight gradient sum_i c_i G_i and all ||G_i||^2 from one pass (wgrad_runs.h).
#include "core/storage.h"
#include "cpu/isa.h"
#include "cpu/wgrad_runs.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

template <class S, class A = core::accumulation_t<S>>
void run(const core::Operands& o, const void* weights, void* wgrad, void* sqnorm, ParallelFor parallel) {
  sum_over_samples<S, Sums::kWgrad>(o, static_cast<const A*>(weights), static_cast<S*>(wgrad), nullptr,
                                    static_cast<A*>(sqnorm), parallel);
}

}  // namespace

void wgrad_sqnorm(const core::Operands& operands, const void* weights, void* wgrad, void* sqnorm,
                  ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(operands.dtype, run, operands, weights, wgrad, sqnorm, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
