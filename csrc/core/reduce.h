// Sums in a fixed order.
#pragma once

#include <cstdint>

namespace ghostgrad::core {

// x[0] + x[stride] + ... by halves: the rounding error grows with log2(n) instead of n, and the order depends on n
// alone. `static`, since each instruction set of the CPU half needs a copy of its own.
static inline double pairwise_sum(const double* x, int64_t n, int64_t stride) {
  if (n <= 8) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += x[i * stride];
    return sum;
  }
  const int64_t half = n / 2;
  return pairwise_sum(x, half, stride) + pairwise_sum(x + half * stride, n - half, stride);
}

}  // namespace ghostgrad::core
