// wgrad_moments on CUDA: sum_i G_i, sum_i G_i^2 element by element and all ||G_i||^2 from one pass over the tiles of
// G_i = b_i^T a_i.
//
// The walk is that of wgrad_sqnorm (wgrad_sqnorm.cu): a block owns one tile for a run of samples and keeps two running
// tiles in registers, of the elements and of their squares. Runs are added in order by a second kernel.
#include "core/storage.h"
#include "cuda/product.cuh"
#include "cuda/reduce.cuh"
#include "cuda/wgrad_moments.h"

namespace ghostgrad::cuda {
namespace {

constexpr int64_t kUnits = 512;  // at most 16 MiB of float32 sums in the workspace

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
__global__ void __launch_bounds__(kThreads) wgrad_moments_kernel(const core::Operands o, const Shape shape,
                                                                 Out* __restrict__ wgrad,         // (runs, d, p)
                                                                 A* __restrict__ squares,         // (runs, d, p)
                                                                 double* __restrict__ partial) {  // (B, tiles)
  __shared__ Stage<A> stage;
  const int64_t elements = o.out_features * o.in_features;
  for (int64_t unit = blockIdx.x; unit < shape.tiles * shape.runs; unit += gridDim.x) {
    const int64_t tile = unit / shape.runs, run = unit % shape.runs;
    const int64_t row = tile / shape.column_tiles * kTile, column = tile % shape.column_tiles * kTile;
    RunningPatch<A> sum, sum_of_squares;
    const int64_t first = run * shape.run_length, last = core::minimum(first + shape.run_length, o.batch);
    for (int64_t sample = first; sample < last; ++sample) {
      A total[kPatch][kPatch];
      wgrad_tile<S>(o, sample, row, column, stage, total);
      const bool flush = (sample - first + 1) % kSamplesPerFlush == 0;
      sum.add(total, A(1), flush);
      const double squares_of_sample = block_sum(patch_squares(total, row, column, o.out_features, o.in_features));
      if (threadIdx.x == 0) partial[sample * shape.tiles + tile] = squares_of_sample;
#pragma unroll
      for (int i = 0; i < kPatch; ++i) {
#pragma unroll
        for (int j = 0; j < kPatch; ++j) total[i][j] *= total[i][j];
      }
      sum_of_squares.add(total, A(1), flush);
    }
    sum.store(wgrad + run * elements, row, column, o.out_features, o.in_features);
    sum_of_squares.store(squares + run * elements, row, column, o.out_features, o.in_features);
  }
}

template <class S>
cudaError_t run(const core::Operands& o, void* wgrad, void* squares, void* sqnorm, void* workspace,
                cudaStream_t stream) {
  using A = core::accumulation_t<S>;
  const Shape shape = shape_of(o);
  const int64_t elements = o.out_features * o.in_features;
  double* partial = static_cast<double*>(workspace);                     // (B, tiles)
  A* run_wgrad = reinterpret_cast<A*>(partial + o.batch * shape.tiles);  // (runs, d, p), if runs > 1
  A* run_squares = run_wgrad + shape.runs * elements;                    // the same
  if (elements > 0) {
    const Launch whole{grid_for(shape.tiles * shape.runs), kThreads};
    if (shape.runs == 1) {
      GHOSTGRAD_TRY(launch(wgrad_moments_kernel<S, S>, whole, stream, o, shape, static_cast<S*>(wgrad),
                           static_cast<A*>(squares), partial));
    } else {
      GHOSTGRAD_TRY(launch(wgrad_moments_kernel<S, A>, whole, stream, o, shape, run_wgrad, run_squares, partial));
      GHOSTGRAD_TRY(launch_add_runs(run_wgrad, shape.runs, elements, static_cast<S*>(wgrad), stream));
      GHOSTGRAD_TRY(launch_add_runs(run_squares, shape.runs, elements, static_cast<A*>(squares), stream));
    }
  }
  return launch_add_partials(partial, o.batch, shape.tiles, static_cast<A*>(sqnorm), stream);
}

}  // namespace

int64_t wgrad_moments_workspace(const core::Operands& operands) {
  const Shape shape = shape_of(operands);
  const int64_t element = operands.dtype == core::DType::kFloat64 ? sizeof(double) : sizeof(float);
  const int64_t runs = shape.runs > 1 ? 2 * shape.runs * operands.out_features * operands.in_features * element : 0;
  return operands.batch * shape.tiles * static_cast<int64_t>(sizeof(double)) + runs;
}

cudaError_t launch_wgrad_moments(const core::Operands& operands, void* wgrad, void* squares, void* sqnorm,
                                 void* workspace, cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(operands.dtype, run, operands, wgrad, squares, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
