// Tile arithmetic: how a range is cut into tiles, and how work is shared out so that the cut depends on shapes alone,
// never on the number of threads. That is what makes results the same bit for bit on any number of threads.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace ghostgrad::core {

GHOSTGRAD_HD constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
GHOSTGRAD_HD constexpr int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }
GHOSTGRAD_HD constexpr int64_t minimum(int64_t x, int64_t y) { return x < y ? x : y; }
GHOSTGRAD_HD constexpr int64_t maximum(int64_t x, int64_t y) { return x > y ? x : y; }

// [0, extent) in `count` tiles of `size` each, the last one perhaps shorter. No tile is empty.
struct Split {
  int64_t extent;
  int64_t size;
  int64_t count;

  GHOSTGRAD_HD constexpr int64_t begin(int64_t tile) const { return tile * size; }
  GHOSTGRAD_HD constexpr int64_t end(int64_t tile) const { return minimum((tile + 1) * size, extent); }
};

// Tiles of at most `limit`, as even as the multiple of `granule` allows: 1040 under a limit of 256 gives five of 208,
// not four of 256 and a rest of 16.
GHOSTGRAD_HD constexpr Split even_split(int64_t extent, int64_t limit, int64_t granule) {
  if (extent <= 0) return Split{0, granule, 0};
  const int64_t wanted = ceil_div(extent, limit);
  const int64_t size = round_up(ceil_div(extent, wanted), granule);
  return Split{extent, size, ceil_div(extent, size)};
}

// The number of tiles on and below the diagonal of a square of `n` x `n` tiles.
GHOSTGRAD_HD constexpr int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

// The tile (row, column), column <= row, that stands at `index` when the lower triangle is counted row by row.
struct TrianglePosition {
  int64_t row, column;
};
GHOSTGRAD_HD TrianglePosition triangle_position(int64_t index) {
  // The float64 root is a guess within one of the truth for any index that fits 52 bits; integers settle it.
  int64_t row = static_cast<int64_t>((::sqrt(8.0 * static_cast<double>(index) + 1.0) - 1.0) / 2.0);
  while (triangle(row + 1) <= index) ++row;
  while (triangle(row) > index) --row;
  return TrianglePosition{row, index - triangle(row)};
}

// Into how many runs of samples the batch is cut for a weight gradient of `tiles` tiles, so that about `units` pieces
// of work exist even if the matrix is small. A run costs one more (d, p) buffer that is written and added, hence no
// more runs than wanted, and none with fewer than kPositionsPerRun positions: those are the multiplications per element
// that its buffer must be worth.
constexpr int64_t kPositionsPerRun = 512;
GHOSTGRAD_HD constexpr int64_t sample_runs(int64_t batch, int64_t positions, int64_t tiles, int64_t units) {
  if (batch <= 1 || tiles <= 0) return 1;
  const int64_t worth = batch * positions / kPositionsPerRun;
  return maximum(1, minimum(minimum(batch, worth), units / tiles));
}

}  // namespace ghostgrad::core
