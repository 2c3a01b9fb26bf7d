// conv_wgrad_sqnorm on the CPU: the weight gradient of a convolution, sum_i G_i, and all ||G_i||^2 from one pass over
// the tiles of G_i.
//
// A unit of work is one tile for a run of samples, as in wgrad_sqnorm.cpp; tiles are those of conv_product.h. With more
// than one run of samples, each leaves its tiles as they are, in blocks, and they are added in order on their way to
// the weight gradient. Memory beside inputs and outputs: a tile and the part of an image it sees per thread, one
// float64 per tile and sample, and a weight gradient for each run if there is more than one run (at most kUnits tiles).
#include "core/reduce.h"
#include "core/storage.h"
#include "cpu/conv_product.h"
#include "cpu/isa.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

constexpr int64_t kUnits = 16;

template <class S>
void run(const core::Convolution& o, void* wgrad, void* sqnorm, ParallelFor parallel) {
  using A = core::accumulation_t<S>;
  if (o.elements() == 0 || o.batch * o.positions() == 0) {
    for (int64_t e = 0; e < o.elements(); ++e) static_cast<S*>(wgrad)[e] = core::from_accumulation<S>(A(0));
    for (int64_t i = 0; i < o.batch; ++i) static_cast<A*>(sqnorm)[i] = A(0);
    return;
  }
  const typename ConvProduct<S>::Cut cut = ConvProduct<S>::cut(o);
  const int64_t tiles = cut.tiles(), tile_elements = cut.tile_elements(o);
  const int64_t run_length = core::ceil_div(o.batch, core::sample_runs(o.batch, o.positions(), tiles, kUnits));
  const int64_t runs = core::ceil_div(o.batch, run_length);

  const int64_t run_elements = runs > 1 ? tiles * runs * tile_elements : 0;
  Scratch scratch(Scratch::room<double>(o.batch * tiles) + Scratch::room<A>(run_elements));
  double* partial = scratch.take<double>(o.batch * tiles);  // (B, tiles)
  A* run_wgrad = scratch.take<A>(run_elements);             // (tiles, runs, tile)
  auto body = [&](int64_t begin, int64_t end) {
    ConvProduct<S> product(o, cut, /*wgrad=*/true, run_length);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t tile = unit / runs, first = unit % runs * run_length;
      product.select_tile(tile);
      product.clear_wgrad();
      for (int64_t i = first; i < core::minimum(first + run_length, o.batch); ++i) {
        partial[i * tiles + tile] = product.template add_sample<true>(i);
        if ((i - first + 1) % kSamplesPerFlush == 0) product.flush_wgrad();
      }
      const A* blocks = product.tile_wgrad();
      if (runs > 1) {
        for (int64_t e = 0; e < tile_elements; ++e) run_wgrad[unit * tile_elements + e] = blocks[e];
      } else {
        product.store_wgrad(blocks, static_cast<S*>(wgrad));
      }
    }
  };
  parallel(tiles * runs, product_operations(o), body);

  if (runs > 1) {
    auto add_runs = [&](int64_t begin, int64_t end) {
      ConvProduct<S> product(o, cut, /*wgrad=*/false, 1);
      for (int64_t tile = begin; tile < end; ++tile) {
        A* sums = run_wgrad + tile * runs * tile_elements;  // (runs, tile), the first becomes the sum
        for (int64_t e = 0; e < tile_elements; e += kLanes<A>) {
          double sum[kLanes<A>] = {};
          for (int64_t r = 0; r < runs; ++r) {
            for (int lane = 0; lane < kLanes<A>; ++lane)
              sum[lane] += static_cast<double>(sums[r * tile_elements + e + lane]);
          }
          for (int lane = 0; lane < kLanes<A>; ++lane) sums[e + lane] = static_cast<A>(sum[lane]);
        }
        product.select_tile(tile);
        product.store_wgrad(sums, static_cast<S*>(wgrad));
      }
    };
    parallel(tiles, 10.0 * static_cast<double>(run_elements), add_runs);
  }
  for (int64_t i = 0; i < o.batch; ++i) {
    static_cast<A*>(sqnorm)[i] = static_cast<A>(core::pairwise_sum(partial + i * tiles, tiles, 1));
  }
}

}  // namespace

void conv_wgrad_sqnorm(const core::Convolution& convolution, void* wgrad, void* sqnorm, ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(convolution.dtype, run, convolution, wgrad, sqnorm, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
