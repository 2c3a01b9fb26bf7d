// gram_sqnorm on CUDA: sqnorm[i] = sum_{s,t} <a_s, a_t> <b_s, b_t>, no Gram matrix in memory.
//
// A block owns a tile of pairs of positions (s, t) of one sample at a time, on or below the diagonal. The features of a
// go by first and leave the tile of inner products <a_s, a_t> in registers, then those of b (product.cuh); a tile on
// the diagonal stages its positions but once. The products of both are added in float64, since they have signs and
// cancel, over each warp, which writes them: partial (B, tiles, warps). Both matrices are symmetric, so a tile below
// the diagonal counts twice. A second kernel adds a sample's partials. No atomics: same inputs, same bits.
//
// Large tiles read a and b less often, small ones make more blocks and have less that is idle when there are few
// positions: the size depends on shapes alone.
#include "cuda/gram_sqnorm.h"
#include "cuda/product.cuh"
#include "cuda/reduce.cuh"

namespace ghostgrad::cuda {
namespace {

constexpr int64_t kEnough = 264;  // blocks: two for each multiprocessor of a large GPU

template <class S, int kTile>
using Math = math_of<S, kTile, kTile>;

int64_t tiles_of(const core::Operands& o, int tile) { return core::triangle(core::ceil_div(o.positions, tile)); }

template <class S>
bool large_tiles(const core::Operands& o) {
  return sizeof(typename Math<S, 128>::Element) == 2 && o.positions > 64 && o.batch * tiles_of(o, 128) >= kEnough;
}

template <class S, int kTile, class A = typename Math<S, kTile>::Sum>
__global__ void __launch_bounds__(kThreads, 1) gram_sqnorm_kernel(const core::Operands o, int64_t tiles,
                                                                  double* __restrict__ partial) {  // (B, tiles, warps)
  using M = Math<S, kTile>;
  using E = typename M::Element;
  using Features = Source<E, Adjacent::kInner>;
  static_assert(M::kRows == kTile && M::kColumns == kTile, "tiles are squares");
  const bool a_vectors = aligned(o.a, (o.a_batch_stride | o.a_position_stride) * static_cast<int64_t>(sizeof(E)));
  const bool b_vectors = aligned(o.b, (o.b_batch_stride | o.b_position_stride) * static_cast<int64_t>(sizeof(E)));
  for (int64_t unit = blockIdx.x; unit < o.batch * tiles; unit += gridDim.x) {
    const int64_t sample = unit / tiles;
    const core::TrianglePosition tile = core::triangle_position(unit % tiles);
    const int row = static_cast<int>(tile.row) * kTile, column = static_cast<int>(tile.column) * kTile;
    const Features factors[2] = {{static_cast<const E*>(o.a) + sample * o.a_batch_stride, o.a_position_stride,
                                  static_cast<int>(o.in_features), static_cast<int>(o.positions), a_vectors},
                                 {static_cast<const E*>(o.b) + sample * o.b_batch_stride, o.b_position_stride,
                                  static_cast<int>(o.out_features), static_cast<int>(o.positions), b_vectors}};
    A aa[M::kSums];
    multiply<M, Adjacent::kInner>(
        0, 2, [&](int factor) { return static_cast<int>(factor == 0 ? o.in_features : o.out_features); },
        [&](int factor, int k, auto& stage) {
          const Features x = factor == 0 ? factors[0] : factors[1];
          x.stage(k, row, stage.rows);
          if (row != column) x.stage(k, column, stage.columns);
        },
        [&](int factor, const A(&sums)[M::kSums]) {
          double total = 0.0;
#pragma unroll
          for (int i = 0; i < M::kSums; ++i) {
            if (factor == 0) {
              aa[i] = sums[i];
            } else if (row + M::row(i) < o.positions && column + M::column(i) < o.positions) {
              total += static_cast<double>(aa[i]) * static_cast<double>(sums[i]);
            }
          }
          if (factor == 1) write_warp_sum(row == column ? total : 2.0 * total, partial + unit * kWarps);
        },
        row == column);
  }
}

template <class S>
int64_t workspace_of(const core::Operands& o) {
  return o.batch * partials_of(tiles_of(o, large_tiles<S>(o) ? 128 : 64)) * static_cast<int64_t>(sizeof(double));
}

template <class S, int kTile>
cudaError_t run_with(const core::Operands& o, void* sqnorm, double* partial, cudaStream_t stream) {
  using M = Math<S, kTile>;
  const int64_t tiles = tiles_of(o, kTile);
  if (o.batch * tiles > 0) {
    const Launch shape{grid_for(o.batch * tiles), kThreads, kSharedBytes<M, Adjacent::kInner>};
    GHOSTGRAD_TRY(launch(gram_sqnorm_kernel<S, kTile>, shape, stream, o, tiles, partial));
  }
  return launch_add_partials(partial, o.batch, partials_of(tiles), static_cast<typename M::Sum*>(sqnorm), stream);
}

template <class S>
cudaError_t run(const core::Operands& o, void* sqnorm, void* workspace, cudaStream_t stream) {
  double* partial = static_cast<double*>(workspace);
  if constexpr (sizeof(typename Math<S, 128>::Element) == 2) {
    if (large_tiles<S>(o)) return run_with<S, 128>(o, sqnorm, partial, stream);
  }
  return run_with<S, 64>(o, sqnorm, partial, stream);
}

}  // namespace

int64_t gram_sqnorm_workspace(const core::Operands& operands) {
  GHOSTGRAD_FOR_MATH(operands, workspace_of, operands)
  return 0;
}

cudaError_t launch_gram_sqnorm(const core::Operands& operands, void* sqnorm, void* workspace, cudaStream_t stream) {
  GHOSTGRAD_FOR_MATH(operands, run, operands, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
