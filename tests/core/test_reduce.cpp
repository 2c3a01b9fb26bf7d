// Pairwise sums: the right terms, and an error that does not grow with their number.
#include "core/reduce.h"

#include <cmath>
#include <initializer_list>
#include <vector>

#include "expect.h"

using ghostgrad::core::pairwise_sum;

int main() {
  for (int64_t n = 0; n < 200; ++n) {
    for (int64_t stride : {1, 3}) {
      std::vector<double> x(static_cast<size_t>(n * stride + 1), 1e9);
      for (int64_t i = 0; i < n; ++i) x[static_cast<size_t>(i * stride)] = static_cast<double>(i);
      EXPECT(pairwise_sum(x.data(), n, stride) == static_cast<double>(n * (n - 1) / 2), "%ld terms, stride %ld", n,
             stride);
    }
  }
  const std::vector<double> tenths(1 << 20, 0.1);
  EXPECT(std::fabs(pairwise_sum(tenths.data(), 1 << 20, 1) / (0.1 * (1 << 20)) - 1) < 1e-15);
  return failures;
}
