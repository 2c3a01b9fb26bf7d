// wgrad_sqnorm on the CPU: the weight gradient sum_i c_i G_i and all ||G_i||^2 from one pass over the tiles of G_i =
// b_i^T a_i.
//
// A unit of work is one tile of the (d, p) matrix for a run of samples: for each sample in turn the tile of G_i is
// summed in registers, its squares go to that sample's partial, c_i times it to the running tile of the weight
// gradient, and the next sample follows. One run holds the whole batch unless the matrix has too few tiles to go round;
// then each run writes a weight gradient of its own, and they are added in order. Memory beside inputs and outputs: a
// few tiles per thread, one float64 per tile and sample, and runs * d * p elements if there is more than one run (at
// most kUnits tiles).
#include "core/reduce.h"
#include "core/storage.h"
#include "cpu/isa.h"
#include "cpu/product.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

// Pieces of work wanted for small matrices: enough for the cores of a desk machine, few enough that their buffers are
// small.
constexpr int64_t kUnits = 16;
constexpr int64_t kRowsPerUnit = 16;  // of the weight gradient, when runs are added

template <class S>
void run(const core::Operands& o, const void* weights, void* wgrad, void* sqnorm, ParallelFor parallel) {
  using A = core::accumulation_t<S>;
  const Split rows = TileProduct<S>::row_split(o), columns = TileProduct<S>::column_split(o);
  const int64_t tiles = rows.count * columns.count;
  const int64_t elements = o.out_features * o.in_features;
  const int64_t wanted_runs = core::sample_runs(o.batch, o.positions, tiles, kUnits);
  const int64_t run_length = core::maximum(1, core::ceil_div(o.batch, wanted_runs));
  const int64_t runs = core::maximum(1, core::ceil_div(o.batch, run_length));

  const int64_t run_elements = runs > 1 ? runs * elements : 0;
  Scratch scratch(Scratch::room<double>(o.batch * tiles) + Scratch::room<A>(run_elements));
  double* partial = scratch.take<double>(o.batch * tiles);  // (B, tiles)
  A* run_wgrad = scratch.take<A>(run_elements);             // (runs, d, p)
  auto body = [&](int64_t begin, int64_t end) {
    TileProduct<S> product(o, rows, columns, /*wgrad=*/true, run_length);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t tile = unit / runs, this_run = unit % runs;
      product.select_tile(tile / columns.count, tile % columns.count);
      product.clear_wgrad();
      const int64_t first = this_run * run_length, last = core::minimum(first + run_length, o.batch);
      for (int64_t i = first; i < last; ++i) {
        const A weight = weights == nullptr ? A(1) : static_cast<const A*>(weights)[i];
        partial[i * tiles + tile] = product.template add_sample<true>(i, weight);
        if ((i - first + 1) % kSamplesPerFlush == 0) product.flush_wgrad();
      }
      if (runs > 1) {
        product.store_wgrad(run_wgrad + this_run * elements);
      } else {
        product.store_wgrad(static_cast<S*>(wgrad));
      }
    }
  };
  parallel(tiles * runs, product_operations(o), body);

  if (runs > 1) {
    auto add_runs = [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first = unit * kRowsPerUnit * o.in_features;
        const int64_t last = core::minimum(first + kRowsPerUnit * o.in_features, elements);
        for (int64_t e = first; e < last; ++e) {
          double sum = 0.0;
          for (int64_t r = 0; r < runs; ++r) sum += static_cast<double>(run_wgrad[r * elements + e]);
          static_cast<S*>(wgrad)[e] = core::from_accumulation<S>(static_cast<A>(sum));
        }
      }
    };
    parallel(core::ceil_div(o.out_features, kRowsPerUnit), 10.0 * static_cast<double>(runs * elements), add_runs);
  }
  for (int64_t i = 0; i < o.batch; ++i) {
    static_cast<A*>(sqnorm)[i] = static_cast<A>(core::pairwise_sum(partial + i * tiles, tiles, 1));
  }
}

}  // namespace

void wgrad_sqnorm(const core::Operands& operands, const void* weights, void* wgrad, void* sqnorm,
                  ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(operands.dtype, run, operands, weights, wgrad, sqnorm, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
