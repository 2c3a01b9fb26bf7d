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

// The sums of the lanes of `count` vectors.
template <class A, int kCount>
GHOSTGRAD_HD void add_lanes(const Vector<A> (&vectors)[kCount], A (&sums)[kCount]) {
  constexpr int kLane = kLanes<A>;
#pragma GCC unroll 16
  for (int first = 0; first + kLane <= kCount; first += kLane) {
    Vector<A> rows[kLane];
#pragma GCC unroll 16
    for (int i = 0; i < kLane; ++i) rows[i] = vectors[first + i];
    store(sums + first, sums_of_lanes<A>(rows));
  }
#pragma GCC unroll 16
  for (int i = kCount / kLane * kLane; i < kCount; ++i) sums[i] = horizontal_sum<A>(vectors[i]);
}

// value[i][j] = <x_i, y_j>. Row pointers, not a stride: there may be fewer than kDotRows, and what comes after them
// repeats the first and gives zero.
template <class S>
DotBlock dot_block(const S* const (&x)[kDotRows], const S* const (&y)[kDotRows], int64_t x_rows, int64_t y_rows,
                   int64_t length) {
  using A = core::accumulation_t<S>;
  constexpr int64_t kStep = kLanes<A> * kElements<S>;
  DotBlock block = {};
  for (int64_t first = 0; first < length; first += kRunVectors * kStep) {
    const int64_t last = core::minimum(length, first + kRunVectors * kStep);
    Vector<A> sums[kDotRows * kDotRows];
#pragma GCC unroll 16
    for (int i = 0; i < kDotRows * kDotRows; ++i) sums[i] = Vector<A>{};
    const auto add = [&](auto load_at) __attribute__((always_inline)) {
      Vector<A> columns[kDotRows];
#pragma GCC unroll 8
      for (int j = 0; j < kDotRows; ++j) columns[j] = load_at(y[j]);
#pragma GCC unroll 8
      for (int i = 0; i < kDotRows; ++i) {
        const Vector<A> row = load_at(x[i]);
#pragma GCC unroll 8
        for (int j = 0; j < kDotRows; ++j) {
          sums[i * kDotRows + j] = multiply_add<S>(sums[i * kDotRows + j], columns[j], row);
        }
      }
    };
    int64_t k = first;
    for (; k + kStep <= last; k += kStep) add([&](const S* from) { return load_factors(from + k); });
    if (k < last) add([&](const S* from) { return load_factors(from + k, last - k); });
    A dots[kDotRows * kDotRows];
    add_lanes<A, kDotRows * kDotRows>(sums, dots);
    for (int i = 0; i < kDotRows; ++i) {
      for (int j = 0; j < kDotRows; ++j) block.value[i][j] += static_cast<double>(dots[i * kDotRows + j]);
    }
  }
  if (x_rows < kDotRows || y_rows < kDotRows) {
    for (int i = 0; i < kDotRows; ++i) {
      for (int j = 0; j < kDotRows; ++j) {
        if (i >= x_rows || j >= y_rows) block.value[i][j] = 0.0;
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
  double totals[kDotRows] = {};
  for (int64_t t = 0; t < end; t += kDotRows) {
    const S *a_columns[kDotRows], *b_columns[kDotRows];
    gather(a, o.a_position_stride, t, o.positions, a_columns);
    gather(b, o.b_position_stride, t, o.positions, b_columns);
    const int64_t columns = core::minimum(kDotRows, o.positions - t);
    for (int64_t s = core::maximum(begin, t); s < end; s += kDotRows) {
      const S *a_rows[kDotRows], *b_rows[kDotRows];
      gather(a, o.a_position_stride, s, o.positions, a_rows);
      gather(b, o.b_position_stride, s, o.positions, b_rows);
      const int64_t rows = core::minimum(kDotRows, o.positions - s);
      const DotBlock aa = dot_block<S>(a_rows, a_columns, rows, columns, o.in_features);
      const DotBlock bb = dot_block<S>(b_rows, b_columns, rows, columns, o.out_features);
      const double times = s == t ? 1.0 : 2.0;
      for (int i = 0; i < kDotRows; ++i) {
        for (int j = 0; j < kDotRows; ++j) totals[j] += times * aa.value[i][j] * bb.value[i][j];
      }
    }
  }
  double total = 0.0;
  for (int j = 0; j < kDotRows; ++j) total += totals[j];
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
