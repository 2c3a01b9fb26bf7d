// wgrad_sqnorm on CUDA: the weight gradient sum_i c_i G_i and all ||G_i||^2 from one pass over the tiles of G_i = b_i^T
// a_i.
//
// A block owns one 64 x 64 tile of the (d, p) matrix for a run of samples, a thread 4 x 4 of its elements; shared
// memory holds the staged operands (product.cuh). Sample after sample: T goes by and leaves the tile of G_i in
// registers; its squares are added over the block and written by thread 0, partial (B, tiles); c_i times it is added to
// the running tile of the weight gradient, in registers too, which every kSamplesPerFlush samples moves on to float64.
//
// One run holds the whole batch unless the matrix has fewer tiles than a GPU wants blocks (kUnits). Then each run
// writes a weight gradient of its own to the workspace and a second kernel adds them in order. No atomics: the same
// inputs give the same bits.
#include "core/storage.h"
#include "cuda/product.cuh"
#include "cuda/reduce.cuh"
#include "cuda/wgrad_sqnorm.h"

namespace ghostgrad::cuda {
namespace {

constexpr int64_t kUnits = 512;  // at most 8 MiB of float32 weight gradients in the workspace

struct Shape {
  int64_t tiles, column_tiles, run_length, runs;
};

Shape shape_of(const core::Operands& o) {
  const int64_t column_tiles = core::ceil_div(o.in_features, kTile);
  const int64_t tiles = core::ceil_div(o.out_features, kTile) * column_tiles;
  const int64_t run_length =
      core::maximum(1, core::ceil_div(o.batch, core::sample_runs(o.batch, o.positions, tiles, kUnits)));
  return Shape{tiles, column_tiles, run_length, core::maximum(1, core::ceil_div(o.batch, run_length))};
}

// Out is S when there is one run and the result is final, A when runs are added later.
template <class S, class Out, class A = core::accumulation_t<S>>
__global__ void __launch_bounds__(kThreads) wgrad_sqnorm_kernel(const core::Operands o, const Shape shape,
                                                                const A* __restrict__ weights,   // (B,) or null
                                                                Out* __restrict__ wgrad,         // (runs, d, p)
                                                                double* __restrict__ partial) {  // (B, tiles)
  __shared__ Stage<A> stage;
  for (int64_t unit = blockIdx.x; unit < shape.tiles * shape.runs; unit += gridDim.x) {
    const int64_t tile = unit / shape.runs, run = unit % shape.runs;
    const int64_t row = tile / shape.column_tiles * kTile, column = tile % shape.column_tiles * kTile;
    RunningPatch<A> running;
    const int64_t first = run * shape.run_length, last = core::minimum(first + shape.run_length, o.batch);
    for (int64_t sample = first; sample < last; ++sample) {
      A total[kPatch][kPatch];
      wgrad_tile<S>(o, sample, row, column, stage, total);
      running.add(total, weights == nullptr ? A(1) : weights[sample], (sample - first + 1) % kSamplesPerFlush == 0);
      const double squares = block_sum(patch_squares(total, row, column, o.out_features, o.in_features));
      if (threadIdx.x == 0) partial[sample * shape.tiles + tile] = squares;
    }
    running.store(wgrad + run * o.out_features * o.in_features, row, column, o.out_features, o.in_features);
  }
}

template <class S>
cudaError_t run(const core::Operands& o, const void* weights, void* wgrad, void* sqnorm, void* workspace,
                cudaStream_t stream) {
  using A = core::accumulation_t<S>;
  const Shape shape = shape_of(o);
  const int64_t elements = o.out_features * o.in_features;
  double* partial = static_cast<double*>(workspace);                     // (B, tiles)
  A* run_wgrad = reinterpret_cast<A*>(partial + o.batch * shape.tiles);  // (runs, d, p), if runs > 1
  const A* c = static_cast<const A*>(weights);
  if (elements > 0) {
    const int grid = grid_for(shape.tiles * shape.runs);
    if (shape.runs == 1) {
      GHOSTGRAD_TRY(launch(wgrad_sqnorm_kernel<S, S>, Launch{grid, kThreads}, stream, o, shape, c,
                           static_cast<S*>(wgrad), partial));
    } else {
      GHOSTGRAD_TRY(launch(wgrad_sqnorm_kernel<S, A>, Launch{grid, kThreads}, stream, o, shape, c, run_wgrad, partial));
    }
    if (shape.runs > 1) {
      GHOSTGRAD_TRY(launch_add_runs(run_wgrad, shape.runs, elements, static_cast<S*>(wgrad), stream));
    }
  }
  return launch_add_partials(partial, o.batch, shape.tiles, static_cast<A*>(sqnorm), stream);
}

}  // namespace

int64_t wgrad_sqnorm_workspace(const core::Operands& operands) {
  const Shape shape = shape_of(operands);
  const int64_t element = operands.dtype == core::DType::kFloat64 ? sizeof(double) : sizeof(float);
  const int64_t runs = shape.runs > 1 ? shape.runs * operands.out_features * operands.in_features * element : 0;
  return operands.batch * shape.tiles * static_cast<int64_t>(sizeof(double)) + runs;
}

cudaError_t launch_wgrad_sqnorm(const core::Operands& operands, const void* weights, void* wgrad, void* sqnorm,
                                void* workspace, cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(operands.dtype, run, operands, weights, wgrad, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
