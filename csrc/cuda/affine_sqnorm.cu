// affine_sqnorm on CUDA: gradients of a scale and a shift, summed over the batch and their squared norms, bound by
// reading the operands once.
//
// The sums, and how they are added, are those of affine_sums.cuh. With the channels adjacent a tile is what a warp
// reads at once, 512 bytes of a position, and each thread has four positions of 16 bytes of b and x on their way to
// shared memory; of fewer channels a team is a part of a warp. With the positions adjacent a thread has four times 16
// bytes of both in flight, in registers. Where rows of channels do not all begin at 16 bytes, a thread owns as many
// channels, one element each.
#include "core/storage.h"
#include "cuda/affine_sqnorm.h"
#include "cuda/affine_sums.cuh"

namespace ghostgrad::cuda {
namespace {

constexpr int kStages = 4;

template <class S, bool kAligned, int kForm, bool kOneGroup>
__global__ void __launch_bounds__(kThreads, (kAligned && kOneGroup) ? 4 : 1)
    affine_sqnorm_kernel(const core::Normalisation n, const RowPlan plan, const Sums<core::accumulation_t<S>> out) {
  sum_rows<S, 1, kAligned, kStages, kForm, kOneGroup>(n, plan, {}, out);
}

template <class S>
RowPlan plan_of(const core::Affine& o) {
  return row_plan<S, 1, kStages>(o, power_of_two(core::ceil_div(o.channels, kVector<S>), 32), kThreads);
}

template <class S, bool kAligned>
cudaError_t launch_rows(const core::Normalisation& n, const RowPlan& plan, const Sums<core::accumulation_t<S>>& sums,
                        cudaStream_t stream) {
  const Launch shape = plan.launch();
  if (!n.affine.scaled) return launch(affine_sqnorm_kernel<S, kAligned, kShift, true>, shape, stream, n, plan, sums);
  if (n.affine.groups == 1) {
    return launch(affine_sqnorm_kernel<S, kAligned, kScale, true>, shape, stream, n, plan, sums);
  }
  return launch(affine_sqnorm_kernel<S, kAligned, kScale, false>, shape, stream, n, plan, sums);
}

template <class S>
cudaError_t run(const core::Affine& o, const core::AffineResults& results, void* workspace, cudaStream_t stream) {
  using A = core::accumulation_t<S>;
  if (o.after == 1) {
    const RowPlan plan = plan_of<S>(o);
    Sums<A> sums = sums_in<A>(workspace, o, plan.units, plan.tiles, results);
    if (plan.own && results.shift == nullptr) sums.shift = sums.scale = nullptr;
    if (plan.tiles * plan.units > 0) {
      const core::Normalisation n{o, nullptr, nullptr, 0, 0};
      if (rows_aligned(n, sizeof(S))) {
        GHOSTGRAD_TRY((launch_rows<S, true>(n, plan, sums, stream)));
      } else {
        GHOSTGRAD_TRY((launch_rows<S, false>(n, plan, sums, stream)));
      }
    }
    return finish(o, sums, plan.units, plan.own, plan.pieces, plan.tiles, results, stream);
  }
  const PixelPlan plan = pixel_plan<S>(o);
  const int64_t units = plan.units(o);
  const Sums<A> sums = sums_in<A>(workspace, o, units, 0, results);
  if (units * o.channels > 0) {
    GHOSTGRAD_TRY(o.scaled ? launch(pixel_sums_kernel<S, true>, plan.launch(o), stream, o, plan, sums)
                           : launch(pixel_sums_kernel<S, false>, plan.launch(o), stream, o, plan, sums));
  }
  return finish(o, sums, units, false, o.before * plan.pieces, 0, results, stream);
}

template <class S>
int64_t workspace_bytes(const core::Affine& o) {
  using A = core::accumulation_t<S>;
  if (o.after != 1) return sums_bytes<A>(o, pixel_plan<S>(o).units(o), 0);
  const RowPlan plan = plan_of<S>(o);
  return sums_bytes<A>(o, plan.units, plan.tiles);
}

}  // namespace

int64_t affine_sqnorm_workspace(const core::Affine& affine) {
  GHOSTGRAD_FOR_DTYPE(affine.dtype, workspace_bytes, affine)
  return 0;
}

cudaError_t launch_affine_sqnorm(const core::Affine& affine, const core::AffineResults& results, void* workspace,
                                 cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(affine.dtype, run, affine, results, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
