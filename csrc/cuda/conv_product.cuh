// The tiles of the per-sample weight gradient of a convolution: product.cuh's, with patches gathered on their way to
// shared memory.
//
// G_i is one (d, p) matrix for each group, d output channels of the group, p = kernel elements times input channels of
// the group; the inner dimension runs over the positions of all runs. Columns are counted with the channels innermost,
// so that where these are adjacent in memory (channels last) a vector of 16 bytes lies within one kernel element, and
// patches cost no more instructions than a matrix would. A thread stages the same column, or vector of columns, at each
// step: what belongs to it is worked out once per tile.
#pragma once

#include "cuda/product.cuh"

namespace ghostgrad::cuda {
namespace {

struct ConvTiling {
  int64_t row_tiles, column_tiles, tiles, run_length, runs;

  GHOSTGRAD_HD int64_t units() const { return tiles * runs; }
};

template <class Math>
ConvTiling conv_tiling_of(const core::Convolution& o) {
  const int64_t rows = core::ceil_div(o.group_outputs(), Math::kRows);
  const int64_t columns = core::ceil_div(o.in_features(), Math::kColumns);
  const int64_t tiles = o.groups * rows * columns, runs = core::sample_runs(o.batch, o.positions(), tiles, kUnits);
  const int64_t run_length = core::maximum(1, core::ceil_div(o.batch, runs));
  return ConvTiling{rows, columns, tiles, run_length, core::maximum(1, core::ceil_div(o.batch, run_length))};
}

// One tile of one group for one run of samples.
struct ConvUnit {
  int64_t tile, group, run;
  int row, column, first, last;  // of the tile in its group, and of the samples
};
template <class Math>
__device__ __forceinline__ ConvUnit conv_unit_at(const ConvTiling& tiling, int64_t batch, int64_t index) {
  const int64_t tile = index / tiling.runs, run = index % tiling.runs, first = run * tiling.run_length;
  const int64_t in_group = tile % (tiling.row_tiles * tiling.column_tiles);
  return ConvUnit{tile,
                  tile / (tiling.row_tiles * tiling.column_tiles),
                  run,
                  static_cast<int>(in_group / tiling.column_tiles) * Math::kRows,
                  static_cast<int>(in_group % tiling.column_tiles) * Math::kColumns,
                  static_cast<int>(first),
                  static_cast<int>(core::minimum(first + tiling.run_length, batch))};
}

// Where a position of the output is: its run and its place.
struct ConvPosition {
  int run, place[3];
};
__device__ __forceinline__ ConvPosition conv_position(const core::Convolution& o, int position) {
  ConvPosition at;
#pragma unroll
  for (int i = 2; i >= 0; --i) {
    const int size = static_cast<int>(o.out[i]);
    at.place[i] = position % size;
    position /= size;
  }
  at.run = position;
  return at;
}

// Stages kStep positions of a tile's rows (output channels) and columns (input patches) of one group.
template <class S>
struct ConvSource {
  const core::Convolution& o;
  const S *x, *b;  // of the group
  bool x_vectors, b_vectors;

  __device__ __forceinline__ ConvSource(const core::Convolution& convolution, int64_t group)
      : o(convolution),
        x(static_cast<const S*>(o.x) + group * o.group_channels() * o.x_strides[2]),
        b(static_cast<const S*>(o.b) + group * o.group_outputs() * o.b_strides[2]) {
    constexpr int64_t kVector = 16 / sizeof(S);
    int64_t x_strides = 0, b_strides = 0;  // of everything but the channels
#pragma unroll
    for (int i = 0; i < 6; ++i) {
      x_strides |= i == 2 ? 0 : o.x_strides[i];
      b_strides |= i == 2 ? 0 : o.b_strides[i];
    }
    x_vectors =
        o.x_strides[2] == 1 && o.group_channels() % kVector == 0 && aligned(o.x, x_strides * int64_t{sizeof(S)});
    b_vectors = o.b_strides[2] == 1 && o.group_outputs() % kVector == 0 && aligned(o.b, b_strides * int64_t{sizeof(S)});
  }

  template <class Rows, class Columns>
  __device__ __forceinline__ void stage(int sample, int t, int row, int column, Rows& rows, Columns& columns) const {
    constexpr int kVector = 16 / sizeof(S);
    if (b_vectors) {
      stage_rows<kVector>(sample, t, row, rows);
    } else {
      stage_rows<1>(sample, t, row, rows);
    }
    if (x_vectors) {
      stage_columns<kVector>(sample, t, column, columns);
    } else {
      stage_columns<1>(sample, t, column, columns);
    }
  }

 private:
  template <int kPiece>
  __device__ __forceinline__ static void copy(S* to, const S* from, bool inside) {
    if constexpr (kPiece * sizeof(S) >= 4) {
      copy_async<kPiece * sizeof(S)>(to, from, inside ? kPiece * static_cast<int>(sizeof(S)) : 0);
    } else {
      S value{};
      if (inside) value = *from;
      *to = value;
    }
  }

  template <int kPiece, int kStep, int kExtent, int kPad>
  __device__ __forceinline__ void stage_rows(int sample, int t, int row,
                                             Staged<S, Adjacent::kOuter, kStep, kExtent, kPad>& to) const {
    constexpr int kInRow = kExtent / kPiece, kRowsApart = kThreads / kInRow;
    const int along = static_cast<int>(threadIdx.x) % kInRow * kPiece, across = static_cast<int>(threadIdx.x) / kInRow;
    const bool some = row + along < o.group_outputs();
    const S* channels = b + sample * o.b_strides[0] + (row + along) * o.b_strides[2];
#pragma unroll 2
    for (int i = across; i < kStep; i += kRowsApart) {
      const bool inside = some && t + i < o.positions();
      const ConvPosition at = conv_position(o, t + i);
      const S* from = channels + at.run * o.b_strides[1] + at.place[0] * o.b_strides[3] + at.place[1] * o.b_strides[4] +
                      at.place[2] * o.b_strides[5];
      copy<kPiece>(to.at(i, along), inside ? from : b, inside);
    }
  }

  template <int kPiece, int kStep, int kExtent, int kPad>
  __device__ __forceinline__ void stage_columns(int sample, int t, int column,
                                                Staged<S, Adjacent::kOuter, kStep, kExtent, kPad>& to) const {
    constexpr int kInRow = kExtent / kPiece, kRowsApart = kThreads / kInRow;
    const int along = static_cast<int>(threadIdx.x) % kInRow * kPiece, across = static_cast<int>(threadIdx.x) / kInRow;
    const int group_channels = static_cast<int>(o.group_channels());
    const bool some = column + along < o.in_features();
    int element = some ? (column + along) / group_channels : 0;
    const S* channels = x + sample * o.x_strides[0] + (column + along - element * group_channels) * o.x_strides[2];
    int shift[3];  // from the output's place times the stride to the input's
#pragma unroll
    for (int i = 2; i >= 0; --i) {
      const int size = static_cast<int>(o.kernel[i]);
      shift[i] = element % size * static_cast<int>(o.dilation[i]) - static_cast<int>(o.padding[i]);
      element /= size;
    }
#pragma unroll 2
    for (int i = across; i < kStep; i += kRowsApart) {
      const ConvPosition at = conv_position(o, t + i);
      bool inside = some && t + i < o.positions();
      const S* from = channels + at.run * o.x_strides[1];
#pragma unroll
      for (int dim = 0; dim < 3; ++dim) {
        const int place = at.place[dim] * static_cast<int>(o.stride[dim]) + shift[dim];
        inside = inside && place >= 0 && place < o.size[dim];
        from += place * o.x_strides[3 + dim];
      }
      copy<kPiece>(to.at(i, along), inside ? from : x, inside);
    }
  }
};

// finish(sample, sums) for each sample of the unit, sums being this thread's part of the tile of G_i.
template <class Math, class Finish>
__device__ __forceinline__ void conv_tiles(const core::Convolution& o, const ConvUnit& unit, const Finish& finish) {
  const ConvSource<typename Math::Element> source(o, unit.group);
  const int positions = static_cast<int>(o.positions());
  multiply<Math, Adjacent::kOuter>(
      unit.first, unit.last, [&](int) { return positions; },
      [&](int sample, int t, auto& stage) {
        source.stage(sample, t, unit.row, unit.column, stage.rows, stage.columns);
      },
      finish);
}

}  // namespace
}  // namespace ghostgrad::cuda
