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
template <class S>
using FirstMath = warpgroups_or<S, Math<S>, 256>;

// Blocks of a multiprocessor that registers must leave room for; fragments of tf32 take twice those of half types.
template <class M>
constexpr int kBlocks = std::is_same_v<M, Math<TF32>> || M::kBlockThreads > kThreads ? 1 : 2;

template <class M>
__global__ void __launch_bounds__(M::kBlockThreads, kBlocks<M>)
    outer_sqnorm_kernel(const __grid_constant__ Inputs<M> inputs, const Tiling tiling,
                        double* __restrict__ partial) {  // (B, tiles, warps)
  const core::Operands& o = inputs.operands;
  for_each_tile(
      inputs, tiling, [](const Unit&) {},
      [&](const Unit& unit, int64_t sample, const auto& sums) {
        write_squares<M>(sums, unit.row, unit.column, o.out_features, o.in_features,
                         partial + (sample * tiling.tiles + unit.tile) * kWarps);
      },
      [](const Unit&) {});
}

// With nothing to carry from sample to sample, every sample may be a run.
template <class M>
Tiling outer_tiling(const core::Operands& o) {
  Tiling tiling = tiling_of<M>(o);
  tiling.runs = o.batch;
  tiling.run_length = 1;
  return tiling;
}

template <class M>
int64_t workspace_with(const core::Operands& o) {
  return o.batch * partials_of(outer_tiling<M>(o).tiles) * int64_t{sizeof(double)};
}
template <class S>
int64_t workspace_of(const core::Operands& o) {
  return core::maximum(workspace_with<FirstMath<S>>(o), workspace_with<Math<S>>(o));
}

template <class M>
cudaError_t run_with(const Inputs<M>& inputs, void* sqnorm, double* partial, cudaStream_t stream) {
  const int64_t batch = inputs.operands.batch;
  const Tiling tiling = outer_tiling<M>(inputs.operands);
  if (tiling.units() > 0) {
    GHOSTGRAD_TRY(launch(outer_sqnorm_kernel<M>, launch_of(inputs, tiling), stream, inputs, tiling, partial));
  }
  return launch_add_partials(partial, batch, partials_of(tiling.tiles), static_cast<typename M::Sum*>(sqnorm), stream);
}

template <class S>
cudaError_t run(const core::Operands& o, void* sqnorm, void* workspace, cudaStream_t stream) {
  return with_inputs<FirstMath<S>, Math<S>>(
      o, [&](const auto& inputs) { return run_with(inputs, sqnorm, static_cast<double*>(workspace), stream); });
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
