// gram_sqnorm on the CPU: sqnorm[i] = sum_{s,t} <a_s, a_t> <b_s, b_t>, no Gram matrix in memory.
//
// A unit of work is a pair of strips of kStrip positions of one sample (gram_product.h). Partials are float64, added
// pairwise in a fixed order.
#include "core/reduce.h"
#include "core/storage.h"
#include "cpu/gram_product.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

template <class S>
void run(const core::Operands& o, void* sqnorm, ParallelFor parallel) {
  using A = core::accumulation_t<S>;
  const int64_t pairs = strip_pairs(o.positions);

  Scratch scratch(Scratch::room<double>(o.batch * pairs));
  double* partial = scratch.take<double>(o.batch * pairs);  // (B, pairs)
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) partial[unit] = strip_pair_sum<S>(o, unit / pairs, unit % pairs);
  };
  const double T = static_cast<double>(o.positions), features = static_cast<double>(o.in_features + o.out_features);
  parallel(o.batch * pairs, static_cast<double>(o.batch) * T * T * (features + 200), body);

  for (int64_t i = 0; i < o.batch; ++i) {
    static_cast<A*>(sqnorm)[i] = static_cast<A>(core::pairwise_sum(partial + i * pairs, pairs, 1));
  }
}

}  // namespace

void gram_sqnorm(const core::Operands& operands, void* sqnorm, ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(operands.dtype, run, operands, sqnorm, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
