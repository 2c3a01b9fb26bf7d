// wgrad_sqnorm on CUDA: the weight gradient sum_i c_i G_i and all ||G_i||^2 from one pass over the tiles of G_i = b_i^T
// a_i.
//
// A block owns one tile of the (d, p) matrix for a run of samples (wgrad.cuh). Sample after sample: T goes by and
// leaves the tile of G_i in registers; its squares are added over each warp, which writes them, partial (B, tiles,
// warps); c_i times it is added to the running tile of the weight gradient, in registers, too. Beside the product's 2 T
// operations for each element of G_i these are four.
//
// If there is more than one run, each writes a weight gradient of its own to the workspace and a second kernel adds
// them in order. No atomics: the same inputs give the same bits.
#include "cuda/reduce.cuh"
#include "cuda/wgrad.cuh"
#include "cuda/wgrad_sqnorm.h"

namespace ghostgrad::cuda {
namespace {

template <class S>
using Math = math_of<S, 128, 128>;
template <class S>
using FirstMath = warpgroups_or<S, Math<S>, 192>;

// Out is the operands' type when there is one run and the result is final, that of sums when runs are added later.
template <class M, class Out, class A = typename M::Sum>
__global__ void __launch_bounds__(M::kBlockThreads, 1)
    wgrad_sqnorm_kernel(const __grid_constant__ Inputs<M> inputs, const Tiling tiling,
                        const A* __restrict__ weights,   // (B,) or null
                        Out* __restrict__ wgrad,         // (runs, d, p)
                        double* __restrict__ partial) {  // (B, tiles, warps)
  const core::Operands& o = inputs.operands;
  Running<M> running;
  for_each_tile(
      inputs, tiling, [&](const Unit&) { running.clear(); },
      [&](const Unit& unit, int64_t sample, const auto& sums) {
        const A weight = weights == nullptr ? A(1) : weights[sample];
#pragma unroll
        for (int i = 0; i < M::kSums; ++i) running.add(i, weight * sums[i]);
        write_squares<M>(sums, unit.row, unit.column, o.out_features, o.in_features,
                         partial + (sample * tiling.tiles + unit.tile) * kWarps);
      },
      [&](const Unit& unit) {
        store<M>(running.sum, wgrad + unit.run * o.out_features * o.in_features, unit.row, unit.column, o.out_features,
                 o.in_features);
      });
}

template <class M>
int64_t workspace_with(const core::Operands& o) {
  const Tiling tiling = tiling_of<M>(o);
  const int64_t elements = tiling.runs > 1 ? tiling.runs * o.out_features * o.in_features : 0;
  return o.batch * partials_of(tiling.tiles) * int64_t{sizeof(double)} + elements * int64_t{sizeof(typename M::Sum)};
}
template <class S>
int64_t workspace_of(const core::Operands& o) {
  return core::maximum(workspace_with<FirstMath<S>>(o), workspace_with<Math<S>>(o));
}

template <class M>
cudaError_t run_with(const Inputs<M>& inputs, const void* weights, void* wgrad, void* sqnorm, void* workspace,
                     cudaStream_t stream) {
  using Element = typename M::Element;
  using A = typename M::Sum;
  const core::Operands& o = inputs.operands;
  const Tiling tiling = tiling_of<M>(o);
  const int64_t elements = o.out_features * o.in_features;
  double* partial = static_cast<double*>(workspace);                                   // (B, tiles, warps)
  A* run_wgrad = reinterpret_cast<A*>(partial + o.batch * partials_of(tiling.tiles));  // (runs, d, p), if runs > 1
  const A* c = static_cast<const A*>(weights);
  Element* total = static_cast<Element*>(wgrad);
  if (elements > 0) {
    const Launch shape = launch_of(inputs, tiling);
    if (tiling.runs == 1) {
      GHOSTGRAD_TRY(launch(wgrad_sqnorm_kernel<M, Element>, shape, stream, inputs, tiling, c, total, partial));
    } else {
      GHOSTGRAD_TRY(launch(wgrad_sqnorm_kernel<M, A>, shape, stream, inputs, tiling, c, run_wgrad, partial));
      GHOSTGRAD_TRY(launch_add_runs(run_wgrad, tiling.runs, elements, total, stream));
    }
  }
  return launch_add_partials(partial, o.batch, partials_of(tiling.tiles), static_cast<A*>(sqnorm), stream);
}

template <class S>
cudaError_t run(const core::Operands& o, const void* weights, void* wgrad, void* sqnorm, void* workspace,
                cudaStream_t stream) {
  return with_inputs<FirstMath<S>, Math<S>>(
      o, [&](const auto& inputs) { return run_with(inputs, weights, wgrad, sqnorm, workspace, stream); });
}

}  // namespace

int64_t wgrad_sqnorm_workspace(const core::Operands& operands) {
  GHOSTGRAD_FOR_MATH(operands, workspace_of, operands)
  return 0;
}

cudaError_t launch_wgrad_sqnorm(const core::Operands& operands, const void* weights, void* wgrad, void* sqnorm,
                                void* workspace, cudaStream_t stream) {
  GHOSTGRAD_FOR_MATH(operands, run, operands, weights, wgrad, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
