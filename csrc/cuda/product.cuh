// A tile of the per-sample product G_i = b_i^T a_i, or of any product of two operands that are staged through shared
// memory: sum_k rows(k, r) columns(k, c).
//
// A block of 256 threads owns a tile of kRows x kColumns sums, in registers. The inner dimension goes by in steps of
// kStep, whose operands wait in a ring of kStages stages in shared memory: while one is multiplied, the copies of the
// next ones are under way (cp.async), across samples too. Out of range means zero; what a sum of padded rows or columns
// then holds (0 * inf is NaN) must not be looked at, which is the epilogue's business.
//
// Two kinds of mathematics, with the same interface:
//
// - Fused<A, rows, columns>: float or double, by fused multiply-adds. Thread (y, x) of 16 x 16 owns rows 4 y to 4 y + 3
//   and columns 4 x to 4 x + 3 of each 64. kRun products in a row, then the run is added to a total: blockwise
//   summation, whose error grows with kRun + K / kRun and not with K.
// - Matrix<S, rows, columns>: tensor cores with float32 sums; S is BFloat16, Float16 or TF32. Each of 2 x 4 warps owns
//   rows / 2 x columns / 4 of the tile, in fragments of 16 x 8 (primitives.cuh).
//
// Each thread's sums are an array of kSums; row(i) and column(i) say where in the tile sum i is.
#pragma once

#include <type_traits>

#include "core/storage.h"
#include "cuda/device.cuh"

namespace ghostgrad::cuda {
namespace {

// Which index of an operand is adjacent in memory: that of the inner dimension, or the other one.
enum class Adjacent { kInner, kOuter };

// kStep x kExtent elements of an operand in shared memory. The padding keeps the rows of a fragment in different banks.
template <class S, Adjacent kAdjacent, int kStep, int kExtent, int kPad>
struct Staged {
  static constexpr int kLength = (kAdjacent == Adjacent::kInner ? kStep : kExtent) + kPad;  // of a row
  static_assert(kLength * sizeof(S) % 16 == 0, "rows are aligned to 16 bytes");
  alignas(16) S data[(kAdjacent == Adjacent::kInner ? kExtent : kStep) * kLength];

  __device__ __forceinline__ S* at(int inner, int outer) {
    return data + (kAdjacent == Adjacent::kInner ? outer * kLength + inner : inner * kLength + outer);
  }
  __device__ __forceinline__ const S* at(int inner, int outer) const {
    return const_cast<Staged*>(this)->at(inner, outer);
  }
};

template <class A, int kRows_, int kColumns_>
struct Fused {
  using Element = A;
  using Sum = A;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStep = 16, kStages = 3;
  static constexpr int kPatchRows = kRows / 16, kPatchColumns = kColumns / 16, kSums = kPatchRows * kPatchColumns;
  static constexpr int kRun = 256;  // inner positions added before the sum moves on
  static constexpr int kPad = 16 / sizeof(A);
  static constexpr int kBlockThreads = kThreads;
  static constexpr bool kCompensated = sizeof(A) == 4;
  static_assert(kPatchRows % 4 == 0 && kPatchColumns % 4 == 0 && kRun % kStep == 0, "patches and runs come out even");

  // Whatever lies adjacent in memory, the outer index does in shared memory: a thread reads four of it at a time.
  template <Adjacent>
  struct Stage {
    Staged<A, Adjacent::kOuter, kStep, kRows, kPad> rows;
    Staged<A, Adjacent::kOuter, kStep, kColumns, kPad> columns;
  };

  __device__ static int row(int i) {
    return i / kPatchColumns / 4 * 64 + static_cast<int>(threadIdx.x) / 16 * 4 + i / kPatchColumns % 4;
  }
  __device__ static int column(int i) {
    return i % kPatchColumns / 4 * 64 + static_cast<int>(threadIdx.x) % 16 * 4 + i % kPatchColumns % 4;
  }

  struct Sums {
    A value[kSums];

    __device__ __forceinline__ void clear() {
      length_ = 0;
#pragma unroll
      for (int i = 0; i < kSums; ++i) value[i] = run_[i] = A(0);
    }
    template <class Rows, class Columns>
    __device__ __forceinline__ void multiply(const Rows& rows, const Columns& columns) {
#pragma unroll
      for (int k = 0; k < kStep; ++k) {
        A x[kPatchRows], y[kPatchColumns];
#pragma unroll
        for (int i = 0; i < kPatchRows; ++i) x[i] = *rows.at(k, row(i * kPatchColumns));
#pragma unroll
        for (int j = 0; j < kPatchColumns; ++j) y[j] = *columns.at(k, column(j));
#pragma unroll
        for (int i = 0; i < kPatchRows; ++i) {
#pragma unroll
          for (int j = 0; j < kPatchColumns; ++j) run_[i * kPatchColumns + j] += x[i] * y[j];
        }
      }
      length_ += kStep;
      if (length_ == kRun) finish();
    }
    __device__ __forceinline__ void finish() {
      length_ = 0;
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        value[i] += run_[i];
        run_[i] = A(0);
      }
    }

   private:
    A run_[kSums];
    int length_;  // of the run
  };
};

template <class S>
struct MatrixElement {
  using type = S;
};
template <>
struct MatrixElement<TF32> {
  using type = float;
};

template <class S, int kRows_, int kColumns_>
struct Matrix {
  using Element = typename MatrixElement<S>::type;
  using Sum = float;
  static constexpr bool kHalf = sizeof(Element) == 2;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStep = kHalf ? 32 : 16, kStages = 4;
  static constexpr int kDepth = kHalf ? 16 : 8;  // inner positions of one instruction
  static constexpr int kWarpRows = kRows / 2, kWarpColumns = kColumns / 4;
  static constexpr int kRowFragments = kWarpRows / 16, kColumnFragments = kWarpColumns / 8;
  static constexpr int kSums = kRowFragments * kColumnFragments * 4;
  static constexpr int kBlockThreads = kThreads;
  static constexpr bool kCompensated = false;
  static_assert(kColumnFragments % 2 == 0, "two of them are loaded at once");

  template <Adjacent kAdjacent>
  struct Stage {
    static constexpr int kPad = kHalf || kAdjacent == Adjacent::kOuter ? 8 : 4;
    Staged<Element, kAdjacent, kStep, kRows, kPad> rows;
    Staged<Element, kAdjacent, kStep, kColumns, kPad> columns;
  };

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int warp_row() { return static_cast<int>(threadIdx.x) / 128 * kWarpRows; }
  __device__ static int warp_column() { return static_cast<int>(threadIdx.x) / 32 % 4 * kWarpColumns; }
  __device__ static int row(int i) { return warp_row() + i / 4 / kColumnFragments * 16 + i % 4 / 2 * 8 + lane() / 4; }
  __device__ static int column(int i) { return warp_column() + i / 4 % kColumnFragments * 8 + lane() % 4 * 2 + i % 2; }

  struct Sums {
    float value[kSums];

    __device__ __forceinline__ void clear() {
#pragma unroll
      for (int i = 0; i < kSums; ++i) value[i] = 0.0f;
    }
    __device__ __forceinline__ void finish() {}

    template <class Rows, class Columns>
    __device__ __forceinline__ void multiply(const Rows& rows, const Columns& columns) {
#pragma unroll
      for (int k = 0; k < kStep; k += kDepth) {
        uint32_t a[kRowFragments][4], b[kColumnFragments][2];
#pragma unroll
        for (int i = 0; i < kRowFragments; ++i) load_rows(rows, k, warp_row() + 16 * i, a[i]);
#pragma unroll
        for (int j = 0; j < kColumnFragments; j += 2) {
          load_columns(columns, k, warp_column() + 8 * j, b[j], b[j + 1]);
        }
#pragma unroll
        for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
          for (int j = 0; j < kColumnFragments; ++j) {
            multiply_add<S>(reinterpret_cast<float (&)[4]>(value[(i * kColumnFragments + j) * 4]), a[i], b[j]);
          }
        }
      }
    }

   private:
    // The fragment of 16 rows and kDepth inner positions.
    template <Adjacent kAdjacent, int kExtent, int kPad>
    __device__ __forceinline__ static void load_rows(const Staged<Element, kAdjacent, kStep, kExtent, kPad>& x, int k,
                                                     int outer, uint32_t (&to)[4]) {
      if constexpr (!kHalf) {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = to_tf32(*x.at(k + lane() % 4 + i / 2 * 4, outer + lane() / 4 + i % 2 * 8));
      } else if constexpr (kAdjacent == Adjacent::kInner) {
        load_matrices(to, x.at(k + lane() / 16 * 8, outer + lane() % 16));
      } else {
        load_matrices_transposed(to, x.at(k + lane() / 16 * 8 + lane() % 8, outer + lane() / 8 % 2 * 8));
      }
    }
    // The fragments of kDepth inner positions and twice 8 columns.
    template <Adjacent kAdjacent, int kExtent, int kPad>
    __device__ __forceinline__ static void load_columns(const Staged<Element, kAdjacent, kStep, kExtent, kPad>& x,
                                                        int k, int outer, uint32_t (&first)[2], uint32_t (&second)[2]) {
      if constexpr (!kHalf) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          first[i] = to_tf32(*x.at(k + lane() % 4 + i * 4, outer + lane() / 4));
          second[i] = to_tf32(*x.at(k + lane() % 4 + i * 4, outer + 8 + lane() / 4));
        }
      } else {
        uint32_t both[4];
        if constexpr (kAdjacent == Adjacent::kInner) {
          load_matrices(both, x.at(k + lane() / 8 % 2 * 8, outer + lane() / 16 * 8 + lane() % 8));
        } else {
          load_matrices_transposed(both, x.at(k + lane() % 16, outer + lane() / 16 * 8));
        }
        first[0] = both[0], first[1] = both[1], second[0] = both[2], second[1] = both[3];
      }
    }
  };
};

// A matrix of `inner` x `outer` elements, one of whose indices is adjacent in memory. Sizes fit 32 bits, strides need
// not.
template <class S, Adjacent kAdjacent>
struct Source {
  static constexpr bool kInner = kAdjacent == Adjacent::kInner;
  const S* data;
  int64_t stride;    // of the other index
  int inner, outer;  // sizes
  bool vectors;      // rows start at multiples of 16 bytes

  // Starts the copy of the elements from (k, o) on, as many as `to` holds. A thread copies elements of one column of
  // vectors, or of single elements, one every so many rows; what is adjacent in memory is what neighbours copy.
  template <Adjacent kStagedAdjacent, int kStep, int kExtent, int kPad>
  __device__ __forceinline__ void stage(int k, int o, Staged<S, kStagedAdjacent, kStep, kExtent, kPad>& to) const {
    if (kAdjacent == kStagedAdjacent && vectors) {
      stage_pieces<16 / sizeof(S)>(k, o, to);
    } else {
      stage_pieces<1>(k, o, to);
    }
  }

 private:
  template <int kPiece, Adjacent kStagedAdjacent, int kStep, int kExtent, int kPad>
  __device__ __forceinline__ void stage_pieces(int k, int o,
                                               Staged<S, kStagedAdjacent, kStep, kExtent, kPad>& to) const {
    constexpr int kInRow = (kInner ? kStep : kExtent) / kPiece, kRowsApart = kThreads / kInRow;
    constexpr int kCount = (kInner ? kExtent : kStep) / kRowsApart;
    static_assert(kThreads % kInRow == 0 && kCount > 0, "every thread copies as much");
    const int along = static_cast<int>(threadIdx.x) % kInRow * kPiece, across = static_cast<int>(threadIdx.x) / kInRow;
    const int left = kInner ? inner - k - along : outer - o - along;  // elements of the row from here on
    const int bytes = (left >= kPiece ? kPiece : left > 0 ? left : 0) * static_cast<int>(sizeof(S));
    const int rows = (kInner ? outer - o : inner - k) - across;  // that are left from the first of this thread's on
    const S* from = data + (kInner ? o + across : k + across) * stride + (kInner ? k : o) + along;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = across + i * kRowsApart;
      S* place = to.at(kInner ? along : row, kInner ? row : along);
      const bool inside = i * kRowsApart < rows && bytes > 0;
      if constexpr (kPiece * sizeof(S) >= 4) {
        copy_async<kPiece * sizeof(S)>(place, inside ? from : data, inside ? bytes : 0);
      } else {
        S value{};
        if (inside) value = *from;
        *place = value;
      }
      from += kRowsApart * stride;
    }
  }
};

__device__ __forceinline__ bool aligned(const void* data, int64_t stride_bytes) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride_bytes)) % 16 == 0;
}

template <class Math, Adjacent kAdjacent>
constexpr int kSharedBytes = Math::kStages * static_cast<int>(sizeof(typename Math::template Stage<kAdjacent>));

// One product after the other, `first` to `last`: stage_step(product, k, stage) starts the copies of kStep inner
// positions of both operands, of which there are length(product); finish(product, sums) gets the sums. If `symmetric`,
// the rows are the columns, too, and are staged alone. All threads of the block call it together, with dynamic shared
// memory of kSharedBytes<Math, kAdjacent>.
template <class Math, Adjacent kAdjacent, class Length, class StageStep, class Finish>
__device__ __forceinline__ void multiply(int first, int last, const Length& length, const StageStep& stage_step,
                                         const Finish& finish, bool symmetric = false) {
  using Stage = typename Math::template Stage<kAdjacent>;
  Stage* ring = reinterpret_cast<Stage*>(dynamic_shared());
  struct Cursor {
    int product, k, slot;
    // To the next step; whether the product ends. One without inner positions has a step of zeros.
    __device__ __forceinline__ bool next(const Length& length) {
      slot = slot + 1 == Math::kStages ? 0 : slot + 1;
      k += Math::kStep;
      if (k < length(product)) return false;
      ++product;
      k = 0;
      return true;
    }
  };
  Cursor ahead{first, 0, 0};
  const auto stage_next = [&] {
    if (ahead.product < last) {
      stage_step(ahead.product, ahead.k, ring[ahead.slot]);
      ahead.next(length);
    }
    commit_copies();  // an empty group counts, too: the one to wait for is always the same
  };
  __syncthreads();  // everyone is done with the ring
  for (int i = 0; i < Math::kStages - 1; ++i) stage_next();
  typename Math::Sums sums;
  sums.clear();
  for (Cursor now{first, 0, 0}; now.product < last;) {
    wait_for_copies<Math::kStages - 2>();
    __syncthreads();  // everyone's copies of this step have arrived, and everyone is done with the step before
    stage_next();
    const Stage& stage = ring[now.slot];
    if constexpr (Math::kRows == Math::kColumns) {
      sums.multiply(stage.rows, symmetric ? stage.rows : stage.columns);
    } else {
      sums.multiply(stage.rows, stage.columns);
    }
    const int product = now.product;
    if (now.next(length)) {
      sums.finish();
      finish(product, sums.value);
      sums.clear();
    }
  }
}

// The mathematics of operands of type S, for tiles of `rows` x `columns`.
template <class S, int kRows, int kColumns>
struct MathOf {
  using type = Matrix<S, kRows, kColumns>;
};
template <int kRows, int kColumns>
struct MathOf<float, kRows, kColumns> {
  using type = Fused<float, kRows, (kColumns < 64 ? kColumns : 64)>;
};
template <int kRows, int kColumns>
struct MathOf<double, kRows, kColumns> {
  using type = Fused<double, 64, 64>;
};
template <class S, int kRows, int kColumns>
using math_of = typename MathOf<S, kRows, kColumns>::type;

constexpr int64_t kUnits = 160;  // pieces of work wanted: somewhat more than a GPU has multiprocessors

// The number of a sample's partial sums, one for each warp and tile.
inline int64_t partials_of(int64_t tiles) { return tiles * kWarps; }

// The sum of squares of the warp's sums that lie inside a (rows, columns) matrix, for the tile at (row, column), to
// its place among the kWarps of the tile.
template <class Math>
__device__ __forceinline__ void write_squares(const typename Math::Sum (&sums)[Math::kSums], int row, int column,
                                              int64_t rows, int64_t columns,
                                              double* __restrict__ partial) {  // (kWarps,)
  typename Math::Sum total = 0;
#pragma unroll
  for (int i = 0; i < Math::kSums; ++i) {
    if (row + Math::row(i) < rows && column + Math::column(i) < columns) total += sums[i] * sums[i];
  }
  write_warp_sum(static_cast<double>(total), partial);
}

// A running sum over samples. Those of fused multiply-adds in float32 are compensated (Kahan), so that the error does
// not grow with the number of samples; tensor cores leave no registers for that, and round their operands far more.
template <class Math>
struct Running {
  using A = typename Math::Sum;
  A sum[Math::kSums];
  A lost[Math::kCompensated ? Math::kSums : 1];  // what rounding has added to the sum so far

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Math::kSums; ++i) sum[i] = lost[Math::kCompensated ? i : 0] = A(0);
  }
  __device__ __forceinline__ void add(int i, A value) {
    if constexpr (Math::kCompensated) {
      const A corrected = value - lost[i], next = sum[i] + corrected;
      // An infinite sum has lost nothing: inf - inf would make NaN of what PyTorch leaves infinite.
      lost[i] = next - next == A(0) ? (next - sum[i]) - corrected : A(0);
      sum[i] = next;
    } else {
      sum[i] += value;
    }
  }
};

}  // namespace
}  // namespace ghostgrad::cuda

// Calls FUNCTION<S>(...) with S the type of the operands: TF32 for float32 operands that may be rounded to it.
#define GHOSTGRAD_FOR_MATH(OPERANDS, FUNCTION, ...)                                \
  if ((OPERANDS).dtype == ::ghostgrad::core::DType::kFloat32 && (OPERANDS).tf32) { \
    return FUNCTION<TF32>(__VA_ARGS__);                                            \
  }                                                                                \
  GHOSTGRAD_FOR_DTYPE((OPERANDS).dtype, FUNCTION, __VA_ARGS__)
