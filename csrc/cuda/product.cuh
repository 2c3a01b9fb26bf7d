// A tile of the per-sample product G_i = b_i^T a_i, or of any product of two operands that are staged through shared
// memory.
//
// A block of 256 threads owns a tile of 64 x 64 sums; thread (y, x) of 16 x 16 owns the 4 x 4 sums at rows 4 y and
// columns 4 x, in registers. The inner dimension goes by in steps of kStep = 16: the block copies 16 x 64 elements of
// either operand to shared memory, widened to the accumulation type, inner dimension first (2 x 4 KiB in float32, 2 x 8
// KiB in float64), and each thread reads four of both per step for sixteen products. Out of range means zero; what a
// sum of padded rows or columns then holds (0 * inf is NaN) must not be looked at, which is the epilogue's business.
//
// Summation: kRun products in a row, then the run is added to a total: blockwise summation, whose error grows with 256
// + K / 256 and not with K.
#pragma once

#include "cuda/device.cuh"

namespace ghostgrad::cuda {
namespace {

constexpr int kTile = 64;  // sums per block and dimension
constexpr int kPatch = 4;  // sums per thread and dimension
constexpr int kStep = 16;  // inner positions staged at a time
constexpr int kRun = 256;  // inner positions added before the sum moves on
constexpr int kSide = kTile / kPatch;
static_assert(kSide * kSide == kThreads, "each thread owns one patch");
static_assert(kRun % kStep == 0, "runs end with a step");

template <class A>
struct Stage {
  // Padded by four, so that a transposing store meets fewer bank conflicts and a patch's four elements stay aligned.
  A rows[kStep][kTile + 4];
  A columns[kStep][kTile + 4];
};

__device__ __forceinline__ int patch_row() { return static_cast<int>(threadIdx.x) / kSide * kPatch; }
__device__ __forceinline__ int patch_column() { return static_cast<int>(threadIdx.x) % kSide * kPatch; }

// Stages 16 x 64 elements whose *outer* index is adjacent in memory: x[k * stride + outer].
template <class S, class A>
__device__ __forceinline__ void stage_inner_major(const S* __restrict__ x, int64_t stride, int64_t inner,
                                                  int64_t inner_end, int64_t outer, int64_t outer_end,
                                                  A (&to)[kStep][kTile + 4]) {
#pragma unroll
  for (int i = 0; i < kStep * kTile / kThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kThreads;
    const int k = index / kTile, o = index % kTile;
    const bool inside = inner + k < inner_end && outer + o < outer_end;
    to[k][o] = inside ? core::to_accumulation(x[(inner + k) * stride + outer + o]) : A(0);
  }
}

// Stages 16 x 64 elements whose *inner* index is adjacent in memory: x[outer * stride + k].
template <class S, class A>
__device__ __forceinline__ void stage_outer_major(const S* __restrict__ x, int64_t stride, int64_t inner,
                                                  int64_t inner_end, int64_t outer, int64_t outer_end,
                                                  A (&to)[kStep][kTile + 4]) {
#pragma unroll
  for (int i = 0; i < kStep * kTile / kThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kThreads;
    const int k = index % kStep, o = index / kStep;
    const bool inside = inner + k < inner_end && outer + o < outer_end;
    to[k][o] = inside ? core::to_accumulation(x[(outer + o) * stride + inner + k]) : A(0);
  }
}

// run[r][c] += sum_k rows[k][r] * columns[k][c] over the staged positions.
template <class A>
__device__ __forceinline__ void multiply_stage(const Stage<A>& stage, A (&run)[kPatch][kPatch]) {
  const int row = patch_row(), column = patch_column();
#pragma unroll
  for (int k = 0; k < kStep; ++k) {
    A x[kPatch], y[kPatch];
#pragma unroll
    for (int i = 0; i < kPatch; ++i) x[i] = stage.rows[k][row + i];
#pragma unroll
    for (int j = 0; j < kPatch; ++j) y[j] = stage.columns[k][column + j];
#pragma unroll
    for (int i = 0; i < kPatch; ++i) {
#pragma unroll
      for (int j = 0; j < kPatch; ++j) run[i][j] += x[i] * y[j];
    }
  }
}

// total = the tile at (row, column) of sum_k rows(k, .)^T columns(k, .), with stage_step(k) filling `stage` for
// positions k, k + 1, ... All threads of the block call it together: it synchronises twice per step. On return, `stage`
// may still be in use by slower threads; the next call's first synchronisation covers that.
template <class A, class StageStep>
__device__ __forceinline__ void multiply_tile(int64_t length, Stage<A>& stage, const StageStep& stage_step,
                                              A (&total)[kPatch][kPatch]) {
  A run[kPatch][kPatch];
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
#pragma unroll
    for (int j = 0; j < kPatch; ++j) total[i][j] = run[i][j] = A(0);
  }
  for (int64_t k = 0; k < length; k += kStep) {
    __syncthreads();  // everyone is done with the stage before it is overwritten
    stage_step(k);
    __syncthreads();  // everyone sees all of it
    multiply_stage(stage, run);
    if ((k + kStep) % kRun == 0 || k + kStep >= length) {
#pragma unroll
      for (int i = 0; i < kPatch; ++i) {
#pragma unroll
        for (int j = 0; j < kPatch; ++j) {
          total[i][j] += run[i][j];
          run[i][j] = A(0);
        }
      }
    }
  }
}

// The patch of this thread of the tile at (row, column) of G_i, i = sample.
template <class S, class A = core::accumulation_t<S>>
__device__ __forceinline__ void wgrad_tile(const core::Operands& o, int64_t sample, int64_t row, int64_t column,
                                           Stage<A>& stage, A (&total)[kPatch][kPatch]) {
  const S* a = static_cast<const S*>(o.a) + sample * o.a_batch_stride;
  const S* b = static_cast<const S*>(o.b) + sample * o.b_batch_stride;
  multiply_tile(
      o.positions, stage,
      [&](int64_t t) {
        stage_inner_major(b, o.b_position_stride, t, o.positions, row, o.out_features, stage.rows);
        stage_inner_major(a, o.a_position_stride, t, o.positions, column, o.in_features, stage.columns);
      },
      total);
}

// A patch of the weight gradient while samples go by: a sum in the accumulation type, which every kSamplesPerFlush
// samples moves on to float64.
constexpr int64_t kSamplesPerFlush = 64;

template <class A>
struct RunningPatch {
  A sum[kPatch][kPatch];
  double flushed[kPatch][kPatch];

  __device__ __forceinline__ RunningPatch() {
#pragma unroll
    for (int i = 0; i < kPatch; ++i) {
#pragma unroll
      for (int j = 0; j < kPatch; ++j) {
        sum[i][j] = A(0);
        flushed[i][j] = 0.0;
      }
    }
  }
  __device__ __forceinline__ void add(const A (&total)[kPatch][kPatch], A weight, bool flush) {
#pragma unroll
    for (int i = 0; i < kPatch; ++i) {
#pragma unroll
      for (int j = 0; j < kPatch; ++j) {
        sum[i][j] += weight * total[i][j];
        if (flush) {
          flushed[i][j] += static_cast<double>(sum[i][j]);
          sum[i][j] = A(0);
        }
      }
    }
  }
  // To its place in a (rows, columns) matrix, of which this is a part of the tile at (row, column).
  template <class Out>
  __device__ __forceinline__ void store(Out* __restrict__ to, int64_t row, int64_t column, int64_t rows,
                                        int64_t columns) const {
#pragma unroll
    for (int i = 0; i < kPatch; ++i) {
#pragma unroll
      for (int j = 0; j < kPatch; ++j) {
        const int64_t r = row + patch_row() + i, c = column + patch_column() + j;
        if (r < rows && c < columns) {
          const A value = static_cast<A>(flushed[i][j] + static_cast<double>(sum[i][j]));
          to[r * columns + c] = core::from_accumulation<Out>(value);
        }
      }
    }
  }
};

// The sum of squares of the patch's elements that lie inside a (rows, columns) matrix.
template <class A>
__device__ __forceinline__ double patch_squares(const A (&total)[kPatch][kPatch], int64_t row, int64_t column,
                                                int64_t rows, int64_t columns) {
  A sum = A(0);
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
#pragma unroll
    for (int j = 0; j < kPatch; ++j) {
      const bool inside = row + patch_row() + i < rows && column + patch_column() + j < columns;
      if (inside) sum += total[i][j] * total[i][j];
    }
  }
  return static_cast<double>(sum);
}

}  // namespace
}  // namespace ghostgrad::cuda
