// conv_wgrad_sqnorm on CUDA: wgrad_sqnorm.cu with the tiles of conv_product.cuh.
#include "core/storage.h"
#include "cuda/conv_product.cuh"
#include "cuda/conv_wgrad_sqnorm.h"
#include "cuda/reduce.cuh"

namespace ghostgrad::cuda {
namespace {

constexpr int64_t kUnits = 512;  // as in wgrad_sqnorm.cu

struct Runs {
  int64_t length, count;
};
Runs runs_of(const core::Convolution& o) {
  const int64_t wanted = core::sample_runs(o.batch, o.positions(), conv_tiles(o).count, kUnits);
  const int64_t length = core::maximum(1, core::ceil_div(o.batch, wanted));
  return Runs{length, core::maximum(1, core::ceil_div(o.batch, length))};
}

// Out is S when there is one run and the result is final, A when runs are added later.
template <class S, class Out, class A = core::accumulation_t<S>>
__global__ void __launch_bounds__(kThreads)
    conv_wgrad_sqnorm_kernel(const core::Convolution o, const ConvTiles tiles, const Runs runs,
                             Out* __restrict__ wgrad,         // (runs, groups, d, p)
                             double* __restrict__ partial) {  // (B, tiles)
  __shared__ Stage<A> stage;
  for (int64_t unit = blockIdx.x; unit < tiles.count * runs.count; unit += gridDim.x) {
    const int64_t tile = unit / runs.count, run = unit % runs.count;
    const ConvPlace place = conv_place(tiles, tile);
    RunningPatch<A> running;
    const int64_t first = run * runs.length, last = core::minimum(first + runs.length, o.batch);
    for (int64_t sample = first; sample < last; ++sample) {
      A total[kPatch][kPatch];
      conv_tile<S>(o, sample, place, stage, total);
      running.add(total, A(1), (sample - first + 1) % kSamplesPerFlush == 0);
      const double squares =
          block_sum(patch_squares(total, place.row, place.column, o.group_outputs(), o.in_features()));
      if (threadIdx.x == 0) partial[sample * tiles.count + tile] = squares;
    }
    running.store(wgrad + (run * o.groups + place.group) * o.group_outputs() * o.in_features(), place.row, place.column,
                  o.group_outputs(), o.in_features());
  }
}

template <class S>
cudaError_t run(const core::Convolution& o, void* wgrad, void* sqnorm, void* workspace, cudaStream_t stream) {
  using A = core::accumulation_t<S>;
  const ConvTiles tiles = conv_tiles(o);
  const Runs runs = runs_of(o);
  double* partial = static_cast<double*>(workspace);                     // (B, tiles)
  A* run_wgrad = reinterpret_cast<A*>(partial + o.batch * tiles.count);  // (runs, groups, d, p), if runs > 1
  if (o.elements() > 0) {
    const int grid = grid_for(tiles.count * runs.count);
    if (runs.count == 1) {
      GHOSTGRAD_TRY(launch(conv_wgrad_sqnorm_kernel<S, S>, Launch{grid, kThreads}, stream, o, tiles, runs,
                           static_cast<S*>(wgrad), partial));
    } else {
      GHOSTGRAD_TRY(
          launch(conv_wgrad_sqnorm_kernel<S, A>, Launch{grid, kThreads}, stream, o, tiles, runs, run_wgrad, partial));
    }
    if (runs.count > 1) {
      GHOSTGRAD_TRY(launch_add_runs(run_wgrad, runs.count, o.elements(), static_cast<S*>(wgrad), stream));
    }
  }
  return launch_add_partials(partial, o.batch, tiles.count, static_cast<A*>(sqnorm), stream);
}

}  // namespace

int64_t conv_wgrad_sqnorm_workspace(const core::Convolution& convolution) {
  const Runs runs = runs_of(convolution);
  const int64_t element = convolution.dtype == core::DType::kFloat64 ? sizeof(double) : sizeof(float);
  const int64_t run_wgrads = runs.count > 1 ? runs.count * convolution.elements() * element : 0;
  return convolution.batch * conv_tiles(convolution).count * static_cast<int64_t>(sizeof(double)) + run_wgrads;
}

cudaError_t launch_conv_wgrad_sqnorm(const core::Convolution& convolution, void* wgrad, void* sqnorm, void* workspace,
                                     cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(convolution.dtype, run, convolution, wgrad, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
