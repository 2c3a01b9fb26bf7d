// gram_sqnorm on CUDA: sqnorm[i] = sum_{s,t} <a_s, a_t> <b_s, b_t>, no Gram matrix in memory.
//
// A block owns one pair of strips of 64 positions of one sample at a time, the second strip not after the first; a
// thread owns 4 x 4 pairs of positions. The features of a go by first, staged through shared memory and turned on the
// way (product.cuh), and leave sixteen inner products <a_s, a_t> in each thread's registers; then those of b. The
// products of both are added in float64, since they have signs and cancel, over the block, and thread 0 writes them:
// partial (B, pairs). Both matrices are symmetric, so a pair of different strips counts twice. A second kernel adds a
// sample's partials. No atomics: same inputs, same bits.
#include "core/storage.h"
#include "cuda/gram_sqnorm.h"
#include "cuda/product.cuh"
#include "cuda/reduce.cuh"

namespace ghostgrad::cuda {
namespace {

int64_t pairs_of(const core::Operands& o) { return core::triangle(core::ceil_div(o.positions, kTile)); }

// The patch of this thread of the inner products <x_s, x_t>, s from `row` on and t from `column` on.
template <class S, class A = core::accumulation_t<S>>
__device__ __forceinline__ void gram_tile(const S* x,  // (T, length), rows `stride` apart
                                          int64_t stride, int64_t positions, int64_t length, int64_t row,
                                          int64_t column, Stage<A>& stage, A (&total)[kPatch][kPatch]) {
  multiply_tile(
      length, stage,
      [&](int64_t k) {
        stage_outer_major(x, stride, k, length, row, positions, stage.rows);
        stage_outer_major(x, stride, k, length, column, positions, stage.columns);
      },
      total);
}

template <class S>
__global__ void __launch_bounds__(kThreads) gram_sqnorm_kernel(const core::Operands o, int64_t pairs,
                                                               double* __restrict__ partial) {  // (B, pairs)
  using A = core::accumulation_t<S>;
  __shared__ Stage<A> stage;
  for (int64_t unit = blockIdx.x; unit < o.batch * pairs; unit += gridDim.x) {
    const int64_t sample = unit / pairs;
    const core::TrianglePosition strips = core::triangle_position(unit % pairs);
    const int64_t row = strips.row * kTile, column = strips.column * kTile;
    A aa[kPatch][kPatch], bb[kPatch][kPatch];
    gram_tile(static_cast<const S*>(o.a) + sample * o.a_batch_stride, o.a_position_stride, o.positions, o.in_features,
              row, column, stage, aa);
    gram_tile(static_cast<const S*>(o.b) + sample * o.b_batch_stride, o.b_position_stride, o.positions, o.out_features,
              row, column, stage, bb);
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kPatch; ++i) {
#pragma unroll
      for (int j = 0; j < kPatch; ++j) {
        const bool inside = row + patch_row() + i < o.positions && column + patch_column() + j < o.positions;
        if (inside) sum += static_cast<double>(aa[i][j]) * static_cast<double>(bb[i][j]);
      }
    }
    const double total = block_sum(sum);
    if (threadIdx.x == 0) partial[unit] = strips.row == strips.column ? total : 2.0 * total;
  }
}

template <class S>
cudaError_t run(const core::Operands& o, void* sqnorm, void* workspace, cudaStream_t stream) {
  const int64_t pairs = pairs_of(o);
  double* partial = static_cast<double*>(workspace);
  if (o.batch * pairs > 0) {
    GHOSTGRAD_TRY(
        launch(gram_sqnorm_kernel<S>, Launch{grid_for(o.batch * pairs), kThreads}, stream, o, pairs, partial));
  }
  return launch_add_partials(partial, o.batch, pairs, static_cast<core::accumulation_t<S>*>(sqnorm), stream);
}

}  // namespace

int64_t gram_sqnorm_workspace(const core::Operands& operands) {
  return operands.batch * pairs_of(operands) * static_cast<int64_t>(sizeof(double));
}

cudaError_t launch_gram_sqnorm(const core::Operands& operands, void* sqnorm, void* workspace, cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(operands.dtype, run, operands, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
