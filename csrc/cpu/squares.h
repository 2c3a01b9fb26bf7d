// Sums of squares of adjacent elements, at the speed of reading them.
#pragma once

#include "core/tiles.h"
#include "cpu/simd.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

constexpr int64_t kRun = 1024;

// Four vectors of sums run side by side in the accumulation type for at most kRun elements and then move on to float64:
// a plain float32 sum over millions of elements loses four digits, this one loses none that float32 can show.
template <class S>
double sum_of_squares(const S* x, int64_t length) {
  using A = core::accumulation_t<S>;
  constexpr int64_t kStep = kLanes<A>;
  double total = 0.0;
  for (int64_t first = 0; first < length; first += kRun) {
    const int64_t last = core::minimum(length, first + kRun);
    Vector<A> sums[4] = {};
    int64_t j = first;
    for (; j + 4 * kStep <= last; j += 4 * kStep) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const Vector<A> value = load(x + j + v * kStep);
        sums[v] += value * value;
      }
    }
    double sum = static_cast<double>(horizontal_sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3])));
    for (; j < last; ++j) {
      const A value = core::to_accumulation(x[j]);
      sum += static_cast<double>(value * value);
    }
    total += sum;
  }
  return total;
}

}  // namespace
}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
