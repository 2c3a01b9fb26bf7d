// row_sqnorm on CUDA: sqnorm[i] = sum_j x[i, j]^2, bound by reading x once.
//
// A block owns one piece of kPiece = 8192 elements of one row at a time. A thread reads every 256th element of the
// piece, neighbours reading neighbours, and adds at most 32 squares in the accumulation type; the block adds its
// threads' sums in float64 and thread 0 writes the result: partial (B, pieces). A second kernel adds a row's partials.
// No atomics: the same inputs give the same bits.
#include "core/storage.h"
#include "cuda/reduce.cuh"
#include "cuda/row_sqnorm.h"

namespace ghostgrad::cuda {
namespace {

constexpr int64_t kPiece = 8192;

template <class S>
__global__ void __launch_bounds__(kThreads) row_sqnorm_kernel(const core::Rows rows, int64_t pieces,
                                                              double* __restrict__ partial) {  // (B, pieces)
  using A = core::accumulation_t<S>;
  for (int64_t unit = blockIdx.x; unit < rows.batch * pieces; unit += gridDim.x) {
    const S* x = static_cast<const S*>(rows.x) + unit / pieces * rows.batch_stride;
    const int64_t first = unit % pieces * kPiece, last = core::minimum(first + kPiece, rows.length);
    A sum = A(0);
    for (int64_t j = first + threadIdx.x; j < last; j += kThreads) {
      const A value = core::to_accumulation(x[j]);
      sum += value * value;
    }
    const double total = block_sum(static_cast<double>(sum));
    if (threadIdx.x == 0) partial[unit] = total;
  }
}

template <class S>
cudaError_t run(const core::Rows& rows, void* sqnorm, void* workspace, cudaStream_t stream) {
  const int64_t pieces = core::ceil_div(rows.length, kPiece);
  double* partial = static_cast<double*>(workspace);
  if (rows.batch * pieces > 0) {
    GHOSTGRAD_TRY(
        launch(row_sqnorm_kernel<S>, Launch{grid_for(rows.batch * pieces), kThreads}, stream, rows, pieces, partial));
  }
  return launch_add_partials(partial, rows.batch, pieces, static_cast<core::accumulation_t<S>*>(sqnorm), stream);
}

}  // namespace

int64_t row_sqnorm_workspace(const core::Rows& rows) {
  return rows.batch * core::ceil_div(rows.length, kPiece) * static_cast<int64_t>(sizeof(double));
}

cudaError_t launch_row_sqnorm(const core::Rows& rows, void* sqnorm, void* workspace, cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(rows.dtype, run, rows, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
