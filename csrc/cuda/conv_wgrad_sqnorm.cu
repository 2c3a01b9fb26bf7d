// conv_wgrad_sqnorm on CUDA: wgrad_sqnorm.cu with the tiles of conv_product.cuh.
#include "cuda/conv_product.cuh"
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

template <class S>
int64_t workspace_of(const core::Convolution& o) {
  const ConvTiling tiling = conv_tiling_of<Math<S>>(o);
  const int64_t elements = tiling.runs > 1 ? tiling.runs * o.elements() : 0;
  return o.batch * partials_of(tiling.tiles) * static_cast<int64_t>(sizeof(double)) +
         elements * static_cast<int64_t>(sizeof(typename Math<S>::Sum));
}

template <class S>
cudaError_t run(const core::Convolution& o, void* wgrad, void* sqnorm, void* workspace, cudaStream_t stream) {
  using Element = typename Math<S>::Element;
  using A = typename Math<S>::Sum;
  const ConvTiling tiling = conv_tiling_of<Math<S>>(o);
  double* partial = static_cast<double*>(workspace);                                   // (B, tiles, warps)
  A* run_wgrad = reinterpret_cast<A*>(partial + o.batch * partials_of(tiling.tiles));  // one per run, if runs > 1
  Element* total = static_cast<Element*>(wgrad);
  if (o.elements() > 0) {
    const Launch shape{grid_for(tiling.tiles * tiling.runs), kThreads, kSharedBytes<Math<S>, Adjacent::kOuter>};
    if (tiling.runs == 1) {
      GHOSTGRAD_TRY(launch(conv_wgrad_sqnorm_kernel<S, Element>, shape, stream, o, tiling, total, partial));
    } else {
      GHOSTGRAD_TRY(launch(conv_wgrad_sqnorm_kernel<S, A>, shape, stream, o, tiling, run_wgrad, partial));
      GHOSTGRAD_TRY(launch_add_runs(run_wgrad, tiling.runs, o.elements(), total, stream));
    }
  }
  return launch_add_partials(partial, o.batch, partials_of(tiling.tiles), static_cast<A*>(sqnorm), stream);
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
