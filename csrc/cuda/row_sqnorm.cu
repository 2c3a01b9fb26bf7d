// row_sqnorm on CUDA: sqnorm[i] = sum_j x[i, j]^2, bound by reading x once.
//
// Rows of up to kShort = 4 KiB belong to a team each, as many threads of a warp as the row has vectors of 16 bytes; at
// B = 1e6 rows of 64 half elements a warp has four of them, and none of its threads idles. A team's first thread writes
// the norm. Longer rows are cut into pieces of at most kPiece = 32 KiB, one for each block at a time, whose first
// thread writes the norm if there is one piece; else partial (B, pieces), which a second kernel adds in order.
//
// A thread has kAtOnce = 4 vectors in flight. It adds their squares (at most 32, and as many of what does not fill a
// vector) in the accumulation type and goes on in float64, in which threads are added as well. Where a row or a piece
// does not begin or end at 16 bytes, its first and last elements are read one at a time. No atomics, and the order
// depends on B, N and addresses modulo 16 alone: the same inputs give the same bits.
#include "core/storage.h"
#include "cuda/reduce.cuh"
#include "cuda/row_sqnorm.h"
#include "cuda/vector.cuh"

namespace ghostgrad::cuda {
namespace {

constexpr int64_t kShort = 4 * 1024, kPiece = 32 * 1024;  // bytes
constexpr int kAtOnce = 4;
constexpr int64_t kBlocks = 4096;  // of short rows; they stride over the rest

template <class S, int kCount>
__device__ __forceinline__ core::accumulation_t<S> squares(const Pack<S, kCount>& pack) {
  core::accumulation_t<S> sum = 0;
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    const auto value = core::to_accumulation(pack.element[e]);
    sum += value * value;
  }
  return sum;
}

// This thread's share of the sum of x[j]^2 over j < length.
template <class S>
__device__ __forceinline__ double sum_squares(const S* x, int64_t length, int thread, int threads) {
  using A = core::accumulation_t<S>;
  const Span span = span_of(length, x, x, x);
  A rest = A(0);
  for (int64_t j = thread; j < span.head; j += threads) rest += squares(load<1>(x + j));
  for (int64_t j = span.tail + thread; j < length; j += threads) rest += squares(load<1>(x + j));
  double sum = static_cast<double>(rest);
  const int vectors = static_cast<int>(span.vectors);
  const S* at = x + span.head + thread * kVector<S>;
  const int step = threads * kVector<S>;
  int v = thread;
  for (; v + (kAtOnce - 1) * threads < vectors; v += kAtOnce * threads, at += kAtOnce * step) {
    Pack<S, kVector<S>> packs[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) packs[u] = load<kVector<S>>(at + u * step);
    sum += static_cast<double>((squares(packs[0]) + squares(packs[1])) + (squares(packs[2]) + squares(packs[3])));
  }
#pragma unroll 1
  for (; v < vectors; v += threads, at += step) sum += static_cast<double>(squares(load<kVector<S>>(at)));
  return sum;
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    short_row_sqnorm_kernel(const core::Rows rows, int lanes, core::accumulation_t<S>* __restrict__ sqnorm) {  // (B,)
  const int lane = static_cast<int>(threadIdx.x) % lanes, team = static_cast<int>(threadIdx.x) / lanes;
  const int64_t teams = kThreads / lanes;
  for (int64_t first = blockIdx.x * teams; first < rows.batch; first += gridDim.x * teams) {
    const int64_t row = first + team;
    const S* x = static_cast<const S*>(rows.x) + row * rows.batch_stride;
    const double sum = row < rows.batch ? sum_squares(x, rows.length, lane, lanes) : 0.0;
    const double total = team_sum(sum, lanes);
    if (lane == 0 && row < rows.batch) sqnorm[row] = static_cast<core::accumulation_t<S>>(total);
  }
}

// Result: double where there are several pieces, else the type of the norms.
template <class S, class Result>
__global__ void __launch_bounds__(kThreads)
    row_sqnorm_kernel(const core::Rows rows, int64_t pieces, Result* __restrict__ partial) {  // (B, pieces)
  constexpr int64_t kElements = kPiece / static_cast<int64_t>(sizeof(S));
  for (int64_t unit = blockIdx.x; unit < rows.batch * pieces; unit += gridDim.x) {
    const int64_t row = quotient(unit, pieces), first = (unit - row * pieces) * kElements;
    const S* x = static_cast<const S*>(rows.x) + row * rows.batch_stride + first;
    const int64_t length = core::minimum(kElements, rows.length - first);
    const double total = block_sum(sum_squares(x, length, static_cast<int>(threadIdx.x), kThreads));
    if (threadIdx.x == 0) partial[unit] = static_cast<Result>(total);
  }
}

int64_t pieces_of(const core::Rows& rows) { return core::ceil_div(rows.length * element_bytes(rows.dtype), kPiece); }

template <class S>
cudaError_t run(const core::Rows& rows, void* sqnorm, void* workspace, cudaStream_t stream) {
  using A = core::accumulation_t<S>;
  if (rows.batch == 0) return cudaSuccess;
  if (rows.length * static_cast<int64_t>(sizeof(S)) <= kShort) {
    const int lanes = power_of_two(core::ceil_div(rows.length, kVector<S>), 32);
    const int64_t blocks = core::ceil_div(rows.batch * lanes, kThreads);
    return launch(short_row_sqnorm_kernel<S>, Launch{grid_for(core::minimum(blocks, kBlocks)), kThreads}, stream, rows,
                  lanes, static_cast<A*>(sqnorm));
  }
  const int64_t pieces = pieces_of(rows);
  const Launch shape{grid_for(rows.batch * pieces), kThreads};
  if (pieces == 1) return launch(row_sqnorm_kernel<S, A>, shape, stream, rows, pieces, static_cast<A*>(sqnorm));
  double* partial = static_cast<double*>(workspace);
  GHOSTGRAD_TRY(launch(row_sqnorm_kernel<S, double>, shape, stream, rows, pieces, partial));
  return launch_add_partials(partial, rows.batch, pieces, static_cast<A*>(sqnorm), stream);
}

}  // namespace

int64_t row_sqnorm_workspace(const core::Rows& rows) {
  const int64_t pieces = pieces_of(rows);
  return pieces > 1 ? rows.batch * pieces * static_cast<int64_t>(sizeof(double)) : 0;
}

cudaError_t launch_row_sqnorm(const core::Rows& rows, void* sqnorm, void* workspace, cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(rows.dtype, run, rows, sqnorm, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
