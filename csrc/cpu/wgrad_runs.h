// The walk of wgrad_sqnorm and wgrad_moments: sums over samples and all ||G_i||^2 from one pass over the tiles of G_i =
// b_i^T a_i.
//
// A unit of work is one tile of the (d, p) matrix for a run of samples: for each sample in turn the tile of G_i is
// summed in registers, its squares go to that sample's partial, c_i times it to the running tile of the weight gradient
// (and its squares, element by element, to a running tile of their own), and the next sample follows. One run holds the
// whole batch unless the matrix has too few tiles to go round; then each run writes sums of its own, and they are added
// in order. Memory beside inputs and outputs: a few tiles per thread, one float64 per tile and sample, and runs * d * p
// elements for either sum if there is more than one run (at most kUnits tiles).
#pragma once

#include "core/reduce.h"
#include "cpu/product.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

// Pieces of work wanted for small matrices: enough for the cores of a desk machine, few enough that their buffers are
// small.
constexpr int64_t kUnits = 16;
constexpr int64_t kRowsPerUnit = 16;  // of a sum, when runs are added

// to[e] = sum_r runs[r][e]
template <class Out, class A>
void add_runs(const A* sums, int64_t runs, const core::Operands& o, Out* to, ParallelFor parallel) {
  const int64_t elements = o.out_features * o.in_features;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * kRowsPerUnit * o.in_features;
      const int64_t last = core::minimum(first + kRowsPerUnit * o.in_features, elements);
      for (int64_t e = first; e < last; ++e) {
        double sum = 0.0;
        for (int64_t r = 0; r < runs; ++r) sum += static_cast<double>(sums[r * elements + e]);
        to[e] = core::from_accumulation<Out>(static_cast<A>(sum));
      }
    }
  };
  parallel(core::ceil_div(o.out_features, kRowsPerUnit), 10.0 * static_cast<double>(runs * elements), body);
}

template <class S, Sums kSums>
void sum_over_samples(const core::Operands& o,
                      const core::accumulation_t<S>* weights,  // (B,) or null
                      S* wgrad,                                // (d, p)
                      core::accumulation_t<S>* squares,        // (d, p), of kMoments
                      core::accumulation_t<S>* sqnorm,         // (B,)
                      ParallelFor parallel) {
  using A = core::accumulation_t<S>;
  using Product = TileProduct<S, kSums>;
  constexpr bool kSquares = kSums == Sums::kMoments;
  const Split rows = Product::row_split(o), columns = Product::column_split(o);
  const int64_t tiles = rows.count * columns.count;
  const int64_t elements = o.out_features * o.in_features;
  const int64_t wanted_runs = core::sample_runs(o.batch, o.positions, tiles, kUnits);
  const int64_t run_length = core::maximum(1, core::ceil_div(o.batch, wanted_runs));
  const int64_t runs = core::maximum(1, core::ceil_div(o.batch, run_length));

  const int64_t run_elements = runs > 1 ? runs * elements : 0, square_elements = kSquares ? run_elements : 0;
  Scratch scratch(Scratch::room<double>(o.batch * tiles) + Scratch::room<A>(run_elements) +
                  Scratch::room<A>(square_elements));
  double* partial = scratch.take<double>(o.batch * tiles);  // (B, tiles)
  A* run_wgrad = scratch.take<A>(run_elements);             // (runs, d, p)
  A* run_squares = scratch.take<A>(square_elements);        // (runs, d, p)
  auto body = [&](int64_t begin, int64_t end) {
    Product product(o, rows, columns, run_length);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t tile = unit / runs, this_run = unit % runs;
      product.select_tile(tile / columns.count, tile % columns.count);
      product.clear_sums();
      const int64_t first = this_run * run_length, last = core::minimum(first + run_length, o.batch);
      for (int64_t i = first; i < last; ++i) {
        partial[i * tiles + tile] = product.add_sample(i, weights == nullptr ? A(1) : weights[i]);
        if ((i - first + 1) % kSamplesPerFlush == 0) product.flush_sums();
      }
      if (runs > 1) {
        product.store_wgrad(run_wgrad + this_run * elements);
        if constexpr (kSquares) product.store_squares(run_squares + this_run * elements);
      } else {
        product.store_wgrad(wgrad);
        if constexpr (kSquares) product.store_squares(squares);
      }
    }
  };
  parallel(tiles * runs, product_operations(o), body);

  if (runs > 1) {
    add_runs(run_wgrad, runs, o, wgrad, parallel);
    if (kSquares) add_runs(run_squares, runs, o, squares, parallel);
  }
  for (int64_t i = 0; i < o.batch; ++i) {
    sqnorm[i] = static_cast<A>(core::pairwise_sum(partial + i * tiles, tiles, 1));
  }
}

}  // namespace
}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
