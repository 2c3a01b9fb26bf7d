// conv_sqnorm on CUDA: outer_sqnorm.cu with the tiles of conv_product.cuh, or by conv_groups.cuh.
#include "cuda/conv_groups.cuh"
#include "cuda/conv_sqnorm.h"
#include "cuda/reduce.cuh"

namespace ghostgrad::cuda {
namespace {

template <class S>
using Math = math_of<S, 128, 128>;

template <class S>
__global__ void __launch_bounds__(kThreads, 1) conv_sqnorm_kernel(const core::Convolution o, const ConvTiling tiling,
                                                                  double* __restrict__ partial) {  // (B, tiles, warps)
  for (int64_t index = blockIdx.x; index < tiling.units(); index += gridDim.x) {
    const ConvUnit unit = conv_unit_at<Math<S>>(tiling, o.batch, index);
    conv_tiles<Math<S>>(o, unit, [&](int64_t sample, const auto& sums) {
      write_squares<Math<S>>(sums, unit.row, unit.column, o.group_outputs(), o.in_features(),
                             partial + (sample * tiling.tiles + unit.tile) * kWarps);
    });
  }
}

// With nothing to carry from sample to sample, every sample may be a run.
template <class S>
ConvTiling outer_tiling(const core::Convolution& o) {
  ConvTiling tiling = conv_tiling_of<Math<S>>(o);
  tiling.runs = o.batch;
  tiling.run_length = 1;
  return tiling;
}

template <class S>
int64_t workspace_of(const core::Convolution& o) {
  if (small_groups(o)) return o.batch * o.groups * int64_t{sizeof(double)};
  return o.batch * partials_of(outer_tiling<S>(o).tiles) * static_cast<int64_t>(sizeof(double));
}

template <class S>
cudaError_t run(const core::Convolution& o, void* sqnorm, void* workspace, cudaStream_t stream) {
  using Element = typename Math<S>::Element;
  const ConvTiling tiling = outer_tiling<S>(o);
  double* partial = static_cast<double*>(workspace);
  if (small_groups(o)) {
    GHOSTGRAD_TRY(launch_conv_groups<Element>(o, group_runs_of(o), static_cast<Element*>(nullptr), partial, stream));
    return launch_add_partials(partial, o.batch, o.groups, static_cast<typename Math<S>::Sum*>(sqnorm), stream);
  }
  if (tiling.tiles * tiling.runs > 0) {
    const Launch shape{grid_for(tiling.tiles * tiling.runs), kThreads, kSharedBytes<Math<S>, Adjacent::kOuter>};
    GHOSTGRAD_TRY(launch(conv_sqnorm_kernel<S>, shape, stream, o, tiling, partial));
  }
  return launch_add_partials(partial, o.batch, partials_of(tiling.tiles), static_cast<typename Math<S>::Sum*>(sqnorm),
                             stream);
}

}  // namespace

int64_t conv_sqnorm_workspace(const core::Convolution& convolution) {
  GHOSTGRAD_FOR_MATH(convolution, workspace_of, convolution)
  return 0;
}

cudaError_t launch_conv_sqnorm(const core::Convolution& convolution, void* sqnorm, void* workspace,
                               cudaStream_t stream) {
  GHOSTGRAD_FOR_MATH(convolution, run, convolution, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
