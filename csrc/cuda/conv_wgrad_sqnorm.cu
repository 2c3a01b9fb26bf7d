// conv_wgrad_sqnorm on CUDA: wgrad_sqnorm.cu with the tiles of conv_product.cuh, or by conv_groups.cuh.
#include "cuda/conv_groups.cuh"
#include "cuda/conv_wgrad_sqnorm.h"
#include "cuda/reduce.cuh"

namespace ghostgrad::cuda {
namespace {

template <class S>
using Math = math_of<S, 128, 128>;

// Out is the operands' type when there is one run and the result is final, that of sums when runs are added later.
template <class S, class Out, class A = typename Math<S>::Sum>
__global__ void __launch_bounds__(kThreads, 1)
    conv_wgrad_sqnorm_kernel(const core::Convolution o, const ConvTiling tiling,
                             Out* __restrict__ wgrad,         // (runs, groups, d, channels, kernel elements)
                             double* __restrict__ partial) {  // (B, tiles, warps)
  for (int64_t index = blockIdx.x; index < tiling.units(); index += gridDim.x) {
    const ConvUnit unit = conv_unit_at<Math<S>>(tiling, o.batch, index);
    Running<Math<S>> running;
    running.clear();
    conv_tiles<Math<S>>(o, unit, [&](int64_t sample, const auto& sums) {
#pragma unroll
      for (int i = 0; i < Math<S>::kSums; ++i) running.add(i, sums[i]);
      write_squares<Math<S>>(sums, unit.row, unit.column, o.group_outputs(), o.in_features(),
                             partial + (sample * tiling.tiles + unit.tile) * kWarps);
    });
    Out* to = wgrad + (unit.run * o.groups + unit.group) * o.group_outputs() * o.in_features();
    const int channels = static_cast<int>(o.group_channels()), elements = static_cast<int>(o.offsets());
#pragma unroll
    for (int i = 0; i < Math<S>::kSums; ++i) {
      const int row = unit.row + Math<S>::row(i), column = unit.column + Math<S>::column(i);
      if (row < o.group_outputs() && column < o.in_features()) {
        const int at = column % channels * elements + column / channels;  // channels are innermost in tiles alone
        to[row * o.in_features() + at] = core::from_accumulation<Out>(running.sum[i]);
      }
    }
  }
}

// How the batch is cut into runs, and partial sums of a sample's squares.
template <class S>
int64_t runs_of(const core::Convolution& o) {
  return small_groups(o) ? group_runs_of(o).count : conv_tiling_of<Math<S>>(o).runs;
}
template <class S>
int64_t partials_of(const core::Convolution& o) {
  return small_groups(o) ? o.groups : partials_of(conv_tiling_of<Math<S>>(o).tiles);
}

template <class S>
int64_t workspace_of(const core::Convolution& o) {
  const int64_t runs = runs_of<S>(o), elements = runs > 1 ? runs * o.elements() : 0;
  return o.batch * partials_of<S>(o) * int64_t{sizeof(double)} + elements * int64_t{sizeof(typename Math<S>::Sum)};
}

template <class S, class Out>
cudaError_t launch_into(const core::Convolution& o, Out* wgrad, double* partial, cudaStream_t stream) {
  if (small_groups(o)) {
    return launch_conv_groups<typename Math<S>::Element>(o, group_runs_of(o), wgrad, partial, stream);
  }
  const ConvTiling tiling = conv_tiling_of<Math<S>>(o);
  const Launch shape{grid_for(tiling.units()), kThreads, kSharedBytes<Math<S>, Adjacent::kOuter>};
  return launch(conv_wgrad_sqnorm_kernel<S, Out>, shape, stream, o, tiling, wgrad, partial);
}

template <class S>
cudaError_t run(const core::Convolution& o, void* wgrad, void* sqnorm, void* workspace, cudaStream_t stream) {
  using A = typename Math<S>::Sum;
  const int64_t runs = runs_of<S>(o), partials = partials_of<S>(o);
  double* partial = static_cast<double*>(workspace);                  // (B, partials)
  A* run_wgrad = reinterpret_cast<A*>(partial + o.batch * partials);  // one per run, if runs > 1
  auto* total = static_cast<typename Math<S>::Element*>(wgrad);
  if (o.elements() > 0 && runs == 1) {
    GHOSTGRAD_TRY((launch_into<S>(o, total, partial, stream)));
  } else if (o.elements() > 0) {
    GHOSTGRAD_TRY((launch_into<S>(o, run_wgrad, partial, stream)));
    GHOSTGRAD_TRY(launch_add_runs(run_wgrad, runs, o.elements(), total, stream));
  }
  return launch_add_partials(partial, o.batch, partials, static_cast<A*>(sqnorm), stream);
}

}  // namespace

int64_t conv_wgrad_sqnorm_workspace(const core::Convolution& convolution) {
  GHOSTGRAD_FOR_MATH(convolution, workspace_of, convolution)
  return 0;
}

cudaError_t launch_conv_wgrad_sqnorm(const core::Convolution& convolution, void* wgrad, void* sqnorm, void* workspace,
                                     cudaStream_t stream) {
  GHOSTGRAD_FOR_MATH(convolution, run, convolution, wgrad, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
