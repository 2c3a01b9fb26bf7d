// A tile of the per-sample weight gradient of a convolution: product.cuh's, with patches gathered on their way to
// shared memory.
//
// G_i is one (d, p) matrix for each group, d output channels of the group, p = input channels of the group times kernel
// elements. The inner dimension runs over the positions of all runs. A thread stages one position per step, always the
// same four rows and the same four columns of the tile: what belongs to these is worked out once per tile.
#pragma once

#include "cuda/product.cuh"

namespace ghostgrad::cuda {
namespace {

struct ConvTiles {
  int64_t row_tiles, column_tiles, count;
};
inline ConvTiles conv_tiles(const core::Convolution& o) {
  const int64_t rows = core::ceil_div(o.group_outputs(), kTile), columns = core::ceil_div(o.in_features(), kTile);
  return ConvTiles{rows, columns, o.groups * rows * columns};
}

struct ConvPlace {
  int64_t group, row, column;
};
__device__ __forceinline__ ConvPlace conv_place(const ConvTiles& tiles, int64_t tile) {
  const int64_t in_group = tile % (tiles.row_tiles * tiles.column_tiles);
  return ConvPlace{tile / (tiles.row_tiles * tiles.column_tiles), in_group / tiles.column_tiles * kTile,
                   in_group % tiles.column_tiles * kTile};
}

// The patch of this thread of one tile of G_i, i = sample.
template <class S, class A = core::accumulation_t<S>>
__device__ __forceinline__ void conv_tile(const core::Convolution& o, int64_t sample, const ConvPlace& place,
                                          Stage<A>& stage, A (&total)[kPatch][kPatch]) {
  constexpr int kPerThread = kStep * kTile / kThreads, kApart = kThreads / kStep;
  const int k = static_cast<int>(threadIdx.x) % kStep, outer = static_cast<int>(threadIdx.x) / kStep;
  const S* x = static_cast<const S*>(o.x) + sample * o.x_strides[0];
  const S* b = static_cast<const S*>(o.b) + sample * o.b_strides[0];

  // A column is an input channel and a kernel element; one that is none lies before any image.
  int64_t channel[kPerThread];
  int32_t shift[kPerThread][3];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    int64_t feature = place.column + outer + i * kApart;
    const bool none = feature >= o.in_features();
    shift[i][2] = static_cast<int32_t>(feature % o.kernel[2] * o.dilation[2] - o.padding[2]);
    feature /= o.kernel[2];
    shift[i][1] = static_cast<int32_t>(feature % o.kernel[1] * o.dilation[1] - o.padding[1]);
    feature /= o.kernel[1];
    shift[i][0] = none ? INT32_MIN : static_cast<int32_t>(feature % o.kernel[0] * o.dilation[0] - o.padding[0]);
    channel[i] = feature / o.kernel[0] * o.x_strides[2];
  }
  multiply_tile(
      o.positions(), stage,
      [&](int64_t t) {
        int64_t position = t + k;
        const bool there = position < o.positions();
        const int64_t out_x = position % o.out[2];
        position /= o.out[2];
        const int64_t out_y = position % o.out[1];
        position /= o.out[1];
        const int64_t out_z = position % o.out[0], run = position / o.out[0];
        const S* gradients = b + run * o.b_strides[1] + out_z * o.b_strides[3] + out_y * o.b_strides[4] +
                             out_x * o.b_strides[5] + place.group * o.group_outputs() * o.b_strides[2];
        const S* image = x + run * o.x_strides[1] + place.group * o.group_channels() * o.x_strides[2];
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          const int64_t row = place.row + outer + i * kApart;
          stage.rows[k][outer + i * kApart] =
              there && row < o.group_outputs() ? core::to_accumulation(gradients[row * o.b_strides[2]]) : A(0);
          const int64_t at_z = out_z * o.stride[0] + shift[i][0], at_y = out_y * o.stride[1] + shift[i][1];
          const int64_t at_x = out_x * o.stride[2] + shift[i][2];
          const bool inside =
              there && at_z >= 0 && at_z < o.size[0] && at_y >= 0 && at_y < o.size[1] && at_x >= 0 && at_x < o.size[2];
          stage.columns[k][outer + i * kApart] =
              inside ? core::to_accumulation(
                           image[channel[i] + at_z * o.x_strides[3] + at_y * o.x_strides[4] + at_x * o.x_strides[5]])
                     : A(0);
        }
      },
      total);
}

}  // namespace
}  // namespace ghostgrad::cuda
