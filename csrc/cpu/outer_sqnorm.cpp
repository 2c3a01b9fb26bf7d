// outer_sqnorm on the CPU: sqnorm[i] = ||b_i^T a_i||^2, G_i in tiles that live in registers and are never written.
//
// A unit of work is one tile of one sample; its sum of squares is a float64 partial result. Partials are added pairwise
// in a fixed order, so the result does not depend on which thread did what. Memory beside the operands: packed panels
// of one tile per thread, one float64 per unit.
#include "core/reduce.h"
#include "core/storage.h"
#include "cpu/isa.h"
#include "cpu/product.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

template <class S>
void run(const core::Operands& o, void* sqnorm, ParallelFor parallel) {
  using A = core::accumulation_t<S>;
  using Product = TileProduct<S, Sums::kNone>;
  const Split rows = Product::row_split(o), columns = Product::column_split(o);
  const int64_t tiles = rows.count * columns.count;

  Scratch scratch(Scratch::room<double>(o.batch * tiles));
  double* partial = scratch.take<double>(o.batch * tiles);  // (B, tiles)
  auto body = [&](int64_t begin, int64_t end) {
    Product product(o, rows, columns, /*samples=*/1);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t tile = unit % tiles;
      product.select_tile(tile / columns.count, tile % columns.count);
      partial[unit] = product.add_sample(unit / tiles, A(1));
    }
  };
  parallel(o.batch * tiles, product_operations(o), body);

  for (int64_t i = 0; i < o.batch; ++i) {
    static_cast<A*>(sqnorm)[i] = static_cast<A>(core::pairwise_sum(partial + i * tiles, tiles, 1));
  }
}

}  // namespace

void outer_sqnorm(const core::Operands& operands, void* sqnorm, ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(operands.dtype, run, operands, sqnorm, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
