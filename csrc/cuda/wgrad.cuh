// The tiles of G_i = b_i^T a_i that blocks share out among themselves: what outer_sqnorm, wgrad_sqnorm and
// wgrad_moments have in common.
//
// The (d, p) matrix is cut into tiles and the batch into runs of samples; a block owns one tile for one run at a time.
// One run holds the whole batch unless the matrix has fewer tiles than a GPU wants blocks.
#pragma once

#include "cuda/product.cuh"

namespace ghostgrad::cuda {
namespace {

constexpr int64_t kUnits = 160;  // blocks wanted: somewhat more than a GPU has multiprocessors

struct Tiling {
  int64_t tiles, column_tiles, run_length, runs;

  __device__ __forceinline__ int64_t units() const { return tiles * runs; }
};

template <class Math>
Tiling tiling_of(const core::Operands& o) {
  const int64_t column_tiles = core::ceil_div(o.in_features, Math::kColumns);
  const int64_t tiles = core::ceil_div(o.out_features, Math::kRows) * column_tiles;
  const int64_t runs = core::sample_runs(o.batch, o.positions, tiles, kUnits);
  const int64_t run_length = core::maximum(1, core::ceil_div(o.batch, runs));
  return Tiling{tiles, column_tiles, run_length, core::maximum(1, core::ceil_div(o.batch, run_length))};
}

// One tile for one run of samples.
struct Unit {
  int64_t tile, run;
  int row, column, first, last;  // of the tile, and of the samples
};
template <class Math>
__device__ __forceinline__ Unit unit_at(const Tiling& tiling, int64_t batch, int64_t index) {
  const int64_t tile = index / tiling.runs, run = index % tiling.runs, first = run * tiling.run_length;
  return Unit{tile,
              run,
              static_cast<int>(tile / tiling.column_tiles) * Math::kRows,
              static_cast<int>(tile % tiling.column_tiles) * Math::kColumns,
              static_cast<int>(first),
              static_cast<int>(core::minimum(first + tiling.run_length, batch))};
}

// finish(sample, sums) for each sample of the unit, sums being this thread's part of the tile of G_i.
template <class Math, class Finish>
__device__ __forceinline__ void wgrad_tiles(const core::Operands& o, const Unit& unit, const Finish& finish) {
  using S = typename Math::Element;
  using Positions = Source<S, Adjacent::kOuter>;
  const int positions = static_cast<int>(o.positions);
  const int in_features = static_cast<int>(o.in_features), out_features = static_cast<int>(o.out_features);
  const S* a = static_cast<const S*>(o.a);
  const S* b = static_cast<const S*>(o.b);
  const bool a_vectors = aligned(a, (o.a_batch_stride | o.a_position_stride) * static_cast<int64_t>(sizeof(S)));
  const bool b_vectors = aligned(b, (o.b_batch_stride | o.b_position_stride) * static_cast<int64_t>(sizeof(S)));
  multiply<Math, Adjacent::kOuter>(
      unit.first, unit.last, [&](int) { return positions; },
      [&](int sample, int t, auto& stage) {
        Positions{b + sample * o.b_batch_stride, o.b_position_stride, positions, out_features, b_vectors}.stage(
            t, unit.row, stage.rows);
        Positions{a + sample * o.a_batch_stride, o.a_position_stride, positions, in_features, a_vectors}.stage(
            t, unit.column, stage.columns);
      },
      finish);
}

// A thread's sums to their places in a (rows, columns) matrix, of which they are a part of the tile at (row, column).
template <class Math, class Out, class A = typename Math::Sum>
__device__ __forceinline__ void store(const A (&sums)[Math::kSums], Out* __restrict__ to, int row, int column,
                                      int64_t rows, int64_t columns) {
#pragma unroll
  for (int i = 0; i < Math::kSums; ++i) {
    const int64_t r = row + Math::row(i), c = column + Math::column(i);
    if (r < rows && c < columns) to[r * columns + c] = core::from_accumulation<Out>(sums[i]);
  }
}

}  // namespace
}  // namespace ghostgrad::cuda
