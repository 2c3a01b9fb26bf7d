// Every element is owned by exactly one tile, whatever the sizes; and what is too large to be counted in 32 bits is
// seen.
#include "core/tiles.h"

#include <initializer_list>

#include "core/limits.h"
#include "expect.h"

using namespace ghostgrad::core;

int main() {
  for (int64_t limit : {1, 12, 64, 256}) {
    for (int64_t granule : {1, 6, 12, 32}) {
      for (int64_t extent = 0; extent < 1100; ++extent) {
        const Split split = even_split(extent, limit, granule);
        int64_t next = 0;
        for (int64_t tile = 0; tile < split.count; ++tile) {
          EXPECT(split.begin(tile) == next && split.end(tile) > next, "tile %ld of %ld", tile, extent);
          EXPECT(split.end(tile) - split.begin(tile) <= split.size);
          next = split.end(tile);
        }
        EXPECT(next == extent, "%ld elements, limit %ld, granule %ld", extent, limit, granule);
        EXPECT(split.size % granule == 0 && split.size <= round_up(limit, granule), "size %ld", split.size);
      }
    }
  }
  int64_t index = 0;
  for (int64_t row = 0; row < 300; ++row) {
    for (int64_t column = 0; column <= row; ++column, ++index) {
      const TrianglePosition position = triangle_position(index);
      EXPECT(position.row == row && position.column == column, "index %ld", index);
    }
  }
  for (int64_t row : {int64_t{1} << 20, (int64_t{1} << 24) - 1, (int64_t{1} << 25) + 3}) {
    EXPECT(triangle_position(triangle(row)).row == row && triangle_position(triangle(row)).column == 0, "row %ld", row);
    EXPECT(
        triangle_position(triangle(row) - 1).row == row - 1 && triangle_position(triangle(row) - 1).column == row - 1,
        "row %ld", row);
  }
  for (int64_t batch : {0, 1, 2, 7, 1000}) {
    for (int64_t tiles : {0, 1, 3, 16, 400}) {
      for (int64_t positions : {0, 1, 64, 5000}) {
        const int64_t runs = sample_runs(batch, positions, tiles, 16);
        const bool worth_it = runs <= batch && runs * tiles <= 16 && runs * kPositionsPerRun <= batch * positions;
        EXPECT(runs == 1 || (runs > 1 && worth_it), "%ld samples, %ld positions, %ld tiles", batch, positions, tiles);
      }
    }
  }
  const Operands small{nullptr, nullptr, DType::kFloat32, kCountable, kCountable, kCountable, kCountable, 0, 0, 0, 0};
  EXPECT(countable(small));
  for (int64_t Operands::* size :
       {&Operands::batch, &Operands::positions, &Operands::in_features, &Operands::out_features}) {
    Operands large = small;
    ++(large.*size);
    EXPECT(!countable(large));
  }
  Affine layer{};
  layer.batch = layer.channels = kCountable;
  layer.before = 64;
  EXPECT(countable(layer));
  for (int64_t Affine::* size : {&Affine::batch, &Affine::channels, &Affine::before}) {
    Affine large = layer;
    ++(large.*size);
    EXPECT(!countable(large));
  }
  const Convolution image{nullptr,   nullptr,   DType::kFloat32, 2,         1,         64,        64, 1,
                          {1, 9, 9}, {1, 9, 9}, {1, 3, 3},       {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {}, {}};
  EXPECT(countable(image));
  for (int64_t Convolution::* size :
       {&Convolution::batch, &Convolution::runs, &Convolution::channels, &Convolution::out_channels}) {
    Convolution large = image;
    large.*size = kCountable + 1;
    EXPECT(!countable(large));
  }
  for (int64_t (Convolution::*sizes)[3] :
       {&Convolution::out, &Convolution::kernel, &Convolution::stride, &Convolution::padding, &Convolution::dilation}) {
    Convolution large = image;
    (large.*sizes)[1] = kCountable + 1;
    EXPECT(!countable(large));
  }
  Convolution far = image;  // each fits, but not the place that they lead to, or their product
  far.stride[2] = int64_t{1} << 27;
  EXPECT(!countable(far));
  far = image;
  far.out[0] = far.out[1] = far.out[2] = int64_t{1} << 29;
  EXPECT(!countable(far));
  return failures;
}
