// outer_sqnorm on CUDA: sqnorm[i] = ||b_i^T a_i||^2, G_i in tiles that live in registers and are never written.
//
// A block owns one tile of G_i for a run of samples at a time (wgrad.cuh). When T has gone by, each thread squares its
// sums, each warp adds them up and writes one float64: partial (B, tiles, warps). A second kernel adds a sample's
// partials. No atomics: the same inputs give the same bits.
#include "cuda/outer_sqnorm.h"
#include "cuda/reduce.cuh"
#include "cuda/wgrad.cuh"

namespace ghostgrad::cuda {
namespace {

template <class S>
using Math = math_of<S, 128, 128>;

// Blocks of a multiprocessor that registers must leave room for; fragments of tf32 take twice those of half types.
template <class S>
constexpr int kBlocks = std::is_same_v<S, TF32> ? 1 : 2;

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks<S>)
    outer_sqnorm_kernel(const core::Operands o, const Tiling tiling,
                        double* __restrict__ partial) {  // (B, tiles, warps)
  for (int64_t index = blockIdx.x; index < tiling.units(); index += gridDim.x) {
    const Unit unit = unit_at<Math<S>>(tiling, o.batch, index);
    wgrad_tiles<Math<S>>(o, unit, [&](int64_t sample, const auto& sums) {
      write_squares<Math<S>>(sums, unit.row, unit.column, o.out_features, o.in_features,
                             partial + (sample * tiling.tiles + unit.tile) * kWarps);
    });
  }
}

// With nothing to carry from sample to sample, every sample may be a run.
template <class S>
Tiling outer_tiling(const core::Operands& o) {
  Tiling tiling = tiling_of<Math<S>>(o);
  tiling.runs = o.batch;
  tiling.run_length = 1;
  return tiling;
}

template <class S>
int64_t workspace_of(const core::Operands& o) {
  return o.batch * partials_of(outer_tiling<S>(o).tiles) * static_cast<int64_t>(sizeof(double));
}

template <class S>
cudaError_t run(const core::Operands& o, void* sqnorm, void* workspace, cudaStream_t stream) {
  const Tiling tiling = outer_tiling<S>(o);
  double* partial = static_cast<double*>(workspace);
  if (tiling.tiles * tiling.runs > 0) {
    const Launch shape{grid_for(tiling.tiles * tiling.runs), kThreads, kSharedBytes<Math<S>, Adjacent::kOuter>};
    GHOSTGRAD_TRY(launch(outer_sqnorm_kernel<S>, shape, stream, o, tiling, partial));
  }
  return launch_add_partials(partial, o.batch, partials_of(tiling.tiles), static_cast<typename Math<S>::Sum*>(sqnorm),
                             stream);
}

}  // namespace

int64_t outer_sqnorm_workspace(const core::Operands& operands) {
  GHOSTGRAD_FOR_MATH(operands, workspace_of, operands)
  return 0;
}

cudaError_t launch_outer_sqnorm(const core::Operands& operands, void* sqnorm, void* workspace, cudaStream_t stream) {
  GHOSTGRAD_FOR_MATH(operands, run, operands, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
