// outer_sqnorm on CUDA: sqnorm[i] = ||b_i^T a_i||^2, G_i in tiles that live in registers and are never written.
//
// A block owns one 64 x 64 tile of one sample's G_i at a time, a thread 4 x 4 of its elements; shared memory holds the
// staged operands (product.cuh). When T has gone by, each thread squares its sixteen sums, the block adds them up, and
// thread 0 writes one float64: partial (B, tiles). A second kernel adds a sample's partials. No atomics: the same
// inputs give the same bits.
#include "core/storage.h"
#include "cuda/outer_sqnorm.h"
#include "cuda/product.cuh"
#include "cuda/reduce.cuh"

namespace ghostgrad::cuda {
namespace {

int64_t tiles_of(const core::Operands& o) {
  return core::ceil_div(o.out_features, kTile) * core::ceil_div(o.in_features, kTile);
}

template <class S>
__global__ void __launch_bounds__(kThreads) outer_sqnorm_kernel(const core::Operands o, int64_t tiles,
                                                                double* __restrict__ partial) {  // (B, tiles)
  using A = core::accumulation_t<S>;
  __shared__ Stage<A> stage;
  const int64_t column_tiles = core::ceil_div(o.in_features, kTile);
  for (int64_t unit = blockIdx.x; unit < o.batch * tiles; unit += gridDim.x) {
    const int64_t tile = unit % tiles;
    const int64_t row = tile / column_tiles * kTile, column = tile % column_tiles * kTile;
    A total[kPatch][kPatch];
    wgrad_tile<S>(o, unit / tiles, row, column, stage, total);
    const double squares = block_sum(patch_squares(total, row, column, o.out_features, o.in_features));
    if (threadIdx.x == 0) partial[unit] = squares;
  }
}

template <class S>
cudaError_t run(const core::Operands& o, void* sqnorm, void* workspace, cudaStream_t stream) {
  const int64_t tiles = tiles_of(o);
  double* partial = static_cast<double*>(workspace);
  if (o.batch * tiles > 0) {
    GHOSTGRAD_TRY(
        launch(outer_sqnorm_kernel<S>, Launch{grid_for(o.batch * tiles), kThreads}, stream, o, tiles, partial));
  }
  return launch_add_partials(partial, o.batch, tiles, static_cast<core::accumulation_t<S>*>(sqnorm), stream);
}

}  // namespace

int64_t outer_sqnorm_workspace(const core::Operands& operands) {
  return operands.batch * tiles_of(operands) * static_cast<int64_t>(sizeof(double));
}

cudaError_t launch_outer_sqnorm(const core::Operands& operands, void* sqnorm, void* workspace, cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(operands.dtype, run, operands, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
