// Products of Gram matrices, sum_{s,t} <a_s, a_t> <b_s, b_t>, without the matrices: the heart of gram_sqnorm and of
// conv_sqnorm where positions are few.
//
// Here the inner dimension of both products is the adjacent one (features), so nothing is packed: a block of kDotRows x
// kDotRows inner products is kept in vector registers, lane by lane, while the features run, and its lanes are added at
// the end. The block of <a_s, a_t> is multiplied with the block of <b_s, b_t> on the spot, in float64, since unlike
// squares these products have signs and cancel. Both matrices are symmetric: blocks left of the diagonal count twice.
#pragma once

#include "core/operands.h"
#include "core/tiles.h"
#include "cpu/simd.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

constexpr int64_t kStrip = 4 * kDotRows;
// Products added in a row per lane before the sum moves on to float64: longer ones would lose digits.
constexpr int64_t kRunVectors = 256;

struct DotBlock {
  double value[kDotRows][kDotRows];
};

// value[i][j] = <x_i, y_j>. Row pointers, not a stride: rows past the end repeat the first and are ignored by the
// caller.
template <class S>
DotBlock dot_block(const S* const (&x)[kDotRows], const S* const (&y)[kDotRows], int64_t length) {
  using A = core::accumulation_t<S>;
  constexpr int64_t kStep = kLanes<A>;
  DotBlock block = {};
  for (int64_t first = 0; first < length; first += kRunVectors * kStep) {
    const int64_t last = core::minimum(length, first + kRunVectors * kStep);
    Vector<A> sums[kDotRows][kDotRows];
#pragma GCC unroll 8
    for (int i = 0; i < kDotRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kDotRows; ++j) sums[i][j] = Vector<A>{};
    }
    int64_t k = first;
    for (; k + kStep <= last; k += kStep) {
      Vector<A> columns[kDotRows];
#pragma GCC unroll 8
      for (int j = 0; j < kDotRows; ++j) columns[j] = load(y[j] + k);
#pragma GCC unroll 8
      for (int i = 0; i < kDotRows; ++i) {
        const Vector<A> row = load(x[i] + k);
#pragma GCC unroll 8
        for (int j = 0; j < kDotRows; ++j) sums[i][j] += row * columns[j];
      }
    }
    for (int i = 0; i < kDotRows; ++i) {
      for (int j = 0; j < kDotRows; ++j) {
        double dot = static_cast<double>(horizontal_sum<A>(sums[i][j]));
        for (int64_t rest = k; rest < last; ++rest) {
          dot += static_cast<double>(core::to_accumulation(x[i][rest]) * core::to_accumulation(y[j][rest]));
        }
        block.value[i][j] += dot;
      }
    }
  }
  return block;
}

// Pointers to kDotRows positions from `first` on; those at or past `end` repeat `first`.
template <class S>
GHOSTGRAD_HD void gather(const S* sample, int64_t stride, int64_t first, int64_t end, const S* (&rows)[kDotRows]) {
  for (int r = 0; r < kDotRows; ++r) rows[r] = sample + (first + r < end ? first + r : first) * stride;
}

// The blocks of one strip of positions with every position up to its end, the ones left of the diagonal twice.
template <class S>
double strip_sum(const core::Operands& o, int64_t sample, int64_t begin, int64_t end) {
  const S* a = static_cast<const S*>(o.a) + sample * o.a_batch_stride;
  const S* b = static_cast<const S*>(o.b) + sample * o.b_batch_stride;
  double total = 0.0;
  for (int64_t t = 0; t < end; t += kDotRows) {
    const S *a_columns[kDotRows], *b_columns[kDotRows];
    gather(a, o.a_position_stride, t, o.positions, a_columns);
    gather(b, o.b_position_stride, t, o.positions, b_columns);
    for (int64_t s = core::maximum(begin, t); s < end; s += kDotRows) {
      const S *a_rows[kDotRows], *b_rows[kDotRows];
      gather(a, o.a_position_stride, s, o.positions, a_rows);
      gather(b, o.b_position_stride, s, o.positions, b_rows);
      const DotBlock aa = dot_block<S>(a_rows, a_columns, o.in_features);
      const DotBlock bb = dot_block<S>(b_rows, b_columns, o.out_features);
      double sum = 0.0;
      for (int64_t i = 0; i < core::minimum(kDotRows, o.positions - s); ++i) {
        for (int64_t j = 0; j < core::minimum(kDotRows, o.positions - t); ++j) sum += aa.value[i][j] * bb.value[i][j];
      }
      total += s == t ? sum : 2.0 * sum;
    }
  }
  return total;
}

// Strips come in pairs, strip k from the top and strip k from the bottom: together every pair has the same number of
// blocks under the diagonal.
inline int64_t strip_pairs(int64_t positions) { return core::ceil_div(core::ceil_div(positions, kStrip), 2); }

template <class S>
double strip_pair_sum(const core::Operands& o, int64_t sample, int64_t top) {
  const int64_t bottom = core::ceil_div(o.positions, kStrip) - 1 - top;
  double sum = strip_sum<S>(o, sample, top * kStrip, core::minimum((top + 1) * kStrip, o.positions));
  if (bottom != top) {
    sum += strip_sum<S>(o, sample, bottom * kStrip, core::minimum((bottom + 1) * kStrip, o.positions));
  }
  return sum;
}

}  // namespace
}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
