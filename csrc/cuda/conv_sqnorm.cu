// conv_sqnorm on CUDA: outer_sqnorm.cu with the tiles of conv_product.cuh.
#include "core/storage.h"
#include "cuda/conv_product.cuh"
#include "cuda/conv_sqnorm.h"
#include "cuda/reduce.cuh"

namespace ghostgrad::cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(kThreads) conv_sqnorm_kernel(const core::Convolution o, const ConvTiles tiles,
                                                               double* __restrict__ partial) {  // (B, tiles)
  using A = core::accumulation_t<S>;
  __shared__ Stage<A> stage;
  for (int64_t unit = blockIdx.x; unit < o.batch * tiles.count; unit += gridDim.x) {
    const ConvPlace place = conv_place(tiles, unit % tiles.count);
    A total[kPatch][kPatch];
    conv_tile<S>(o, unit / tiles.count, place, stage, total);
    const double squares = block_sum(patch_squares(total, place.row, place.column, o.group_outputs(), o.in_features()));
    if (threadIdx.x == 0) partial[unit] = squares;
  }
}

template <class S>
cudaError_t run(const core::Convolution& o, void* sqnorm, void* workspace, cudaStream_t stream) {
  const ConvTiles tiles = conv_tiles(o);
  double* partial = static_cast<double*>(workspace);
  if (o.batch * tiles.count > 0) {
    GHOSTGRAD_TRY(
        launch(conv_sqnorm_kernel<S>, Launch{grid_for(o.batch * tiles.count), kThreads}, stream, o, tiles, partial));
  }
  return launch_add_partials(partial, o.batch, tiles.count, static_cast<core::accumulation_t<S>*>(sqnorm), stream);
}

}  // namespace

int64_t conv_sqnorm_workspace(const core::Convolution& convolution) {
  return convolution.batch * conv_tiles(convolution).count * static_cast<int64_t>(sizeof(double));
}

cudaError_t launch_conv_sqnorm(const core::Convolution& convolution, void* sqnorm, void* workspace,
                               cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(convolution.dtype, run, convolution, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
