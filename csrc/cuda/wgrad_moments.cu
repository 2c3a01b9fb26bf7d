// wgrad_moments on CUDA: sum_i G_i, sum_i G_i^2 element by element, and all ||G_i||^2 from one pass over the tiles of
// G_i = b_i^T a_i.
//
// As wgrad_sqnorm.cu, with a third tile in registers that takes the squares; so tiles are half as wide. If there is
// more than one run, each writes both sums to the workspace and a second kernel adds them in order. No atomics: the
// same inputs give the same bits.
#include "cuda/reduce.cuh"
#include "cuda/wgrad.cuh"
#include "cuda/wgrad_moments.h"

namespace ghostgrad::cuda {
namespace {

template <class S>
using Math = std::conditional_t<std::is_same_v<S, float>, Fused<float, 64, 64>, math_of<S, 128, 64>>;
template <class S>
using FirstMath = warpgroups_or<S, Math<S>, 128>;

// Out is the operands' type when there is one run and the result is final, that of sums when runs are added later.
template <class M, class Out, class A = typename M::Sum>
__global__ void __launch_bounds__(M::kBlockThreads, 1)
    wgrad_moments_kernel(const __grid_constant__ Inputs<M> inputs, const Tiling tiling,
                         Out* __restrict__ wgrad,         // (runs, d, p)
                         A* __restrict__ squares,         // (runs, d, p)
                         double* __restrict__ partial) {  // (B, tiles, warps)
  const core::Operands& o = inputs.operands;
  Running<M> first, second;
  for_each_tile(
      inputs, tiling,
      [&](const Unit&) {
        first.clear();
        second.clear();
      },
      [&](const Unit& unit, int64_t sample, const auto& sums) {
#pragma unroll
        for (int i = 0; i < M::kSums; ++i) {
          first.add(i, sums[i]);
          second.add(i, sums[i] * sums[i]);
        }
        write_squares<M>(sums, unit.row, unit.column, o.out_features, o.in_features,
                         partial + (sample * tiling.tiles + unit.tile) * kWarps);
      },
      [&](const Unit& unit) {
        const int64_t offset = unit.run * o.out_features * o.in_features;
        store<M>(first.sum, wgrad + offset, unit.row, unit.column, o.out_features, o.in_features);
        store<M>(second.sum, squares + offset, unit.row, unit.column, o.out_features, o.in_features);
      });
}

template <class M>
int64_t workspace_with(const core::Operands& o) {
  const Tiling tiling = tiling_of<M>(o);
  const int64_t elements = tiling.runs > 1 ? 2 * tiling.runs * o.out_features * o.in_features : 0;
  return o.batch * partials_of(tiling.tiles) * int64_t{sizeof(double)} + elements * int64_t{sizeof(typename M::Sum)};
}
template <class S>
int64_t workspace_of(const core::Operands& o) {
  return core::maximum(workspace_with<FirstMath<S>>(o), workspace_with<Math<S>>(o));
}

template <class M>
cudaError_t run_with(const Inputs<M>& inputs, void* wgrad, void* squares, void* sqnorm, void* workspace,
                     cudaStream_t stream) {
  using Element = typename M::Element;
  using A = typename M::Sum;
  const core::Operands& o = inputs.operands;
  const Tiling tiling = tiling_of<M>(o);
  const int64_t elements = o.out_features * o.in_features;
  double* partial = static_cast<double*>(workspace);                                   // (B, tiles, warps)
  A* run_wgrad = reinterpret_cast<A*>(partial + o.batch * partials_of(tiling.tiles));  // (runs, d, p), if runs > 1
  A* run_squares = run_wgrad + tiling.runs * elements;
  Element* total = static_cast<Element*>(wgrad);
  A* total_squares = static_cast<A*>(squares);
  if (elements > 0) {
    const Launch shape = launch_of(inputs, tiling);
    if (tiling.runs == 1) {
      GHOSTGRAD_TRY(
          launch(wgrad_moments_kernel<M, Element>, shape, stream, inputs, tiling, total, total_squares, partial));
    } else {
      GHOSTGRAD_TRY(launch(wgrad_moments_kernel<M, A>, shape, stream, inputs, tiling, run_wgrad, run_squares, partial));
      GHOSTGRAD_TRY(launch_add_runs(run_wgrad, tiling.runs, elements, total, stream));
      GHOSTGRAD_TRY(launch_add_runs(run_squares, tiling.runs, elements, total_squares, stream));
    }
  }
  return launch_add_partials(partial, o.batch, partials_of(tiling.tiles), static_cast<A*>(sqnorm), stream);
}

template <class S>
cudaError_t run(const core::Operands& o, void* wgrad, void* squares, void* sqnorm, void* workspace,
                cudaStream_t stream) {
  return with_inputs<FirstMath<S>, Math<S>>(
      o, [&](const auto& inputs) { return run_with(inputs, wgrad, squares, sqnorm, workspace, stream); });
}

}  // namespace

int64_t wgrad_moments_workspace(const core::Operands& operands) {
  GHOSTGRAD_FOR_MATH(operands, workspace_of, operands)
  return 0;
}

cudaError_t launch_wgrad_moments(const core::Operands& operands, void* wgrad, void* squares, void* sqnorm,
                                 void* workspace, cudaStream_t stream) {
  GHOSTGRAD_FOR_MATH(operands, run, operands, wgrad, squares, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
