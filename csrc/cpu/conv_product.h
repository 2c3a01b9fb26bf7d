// The per-sample weight gradient of a convolution, one tile at a time, without patches: the heart of conv_sqnorm and
// conv_wgrad_sqnorm.
//
// G_i is a sum over positions t of outer products: output gradients b_i[., t] times the patch of x_i at t. A *row* of
// the product is an input channel and a kernel offset, a *column* an output channel. In the image, the elements that
// one row meets lie at a fixed distance from those that another row meets: so a patch need not be formed. It is enough
// to have the part of the image that a *strip* of positions sees, with its padding, in a *box* [channel][z][y][x]; row
// r then finds its factor for position t at box[row_offset[r] + position_offset[t]]. The output gradients of the strip
// are packed with positions first, [t][columns], so that columns fill vectors, and the factor from the box is
// broadcast. Packing costs two copies of what is there, not kernel-many.
//
// With few output channels in each of many groups (depthwise convolutions) the lanes of a vector are groups instead,
// in the box too: whatever is said below of a column, of an element of the box, then holds for a vector of groups.
//
// A block of kRows rows x kVectors vectors of sums is kept in registers while t runs, then handed to the epilogue, as
// in product.h; and summation is done as there.
#pragma once

#include "core/operands.h"
#include "core/tiles.h"
#include "cpu/product.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

// Elements of a tile and of a box, as far as one channel and kNv vectors allow: the tile's weight gradient and the
// float64 sums of long samples, packed operands and box stay in the second-level cache together.
constexpr int64_t kConvTile = 64 * 576;
constexpr int64_t kBoxElements = 1 << 15;
// Rows of a block, in steps of three: more, and their addresses do not fit the integer registers.
#if defined(__AVX512F__)
constexpr int kConvRows = 9;
#else
constexpr int kConvRows = 6;
#endif

// to[i, j] = from[i, j] for any strides; fast where either dimension is adjacent in `from` and either in `to`.
template <class S, class A>
void move(const S* from, int64_t from_i, int64_t from_j, int64_t n, int64_t m, A* to, int64_t to_i, int64_t to_j) {
  constexpr int64_t kBlock = kLanes<A>;
  if (from_i == 1 && to_i == 1) {
    for (int64_t j = 0; j < m; ++j) {
      const S* source = from + j * from_j;
      A* target = to + j * to_j;
      int64_t i = 0;
      for (; i + kBlock <= n; i += kBlock) store(target + i, load(source + i));
      for (; i < n; ++i) target[i] = core::to_accumulation(source[i]);
    }
    return;
  }
  if (from_j == 1 && to_j == 1) return move(from, from_j, from_i, m, n, to, to_j, to_i);
  if (from_j == 1 && to_i == 1) return move(from, from_j, from_i, m, n, to, to_j, to_i);
  int64_t done = 0;  // of the i, for all whole blocks of j
  if (from_i == 1 && to_j == 1) {
    for (; done + kBlock <= n; done += kBlock) {
      for (int64_t j = 0; j + kBlock <= m; j += kBlock) {
        Vector<A> block[kBlock];
#pragma GCC unroll 16
        for (int64_t r = 0; r < kBlock; ++r) block[r] = load(from + done + (j + r) * from_j);
        transpose<A>(block);
#pragma GCC unroll 16
        for (int64_t r = 0; r < kBlock; ++r) store(to + (done + r) * to_i + j, block[r]);
      }
    }
  }
  const int64_t whole = m / kBlock * kBlock;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i < done ? whole : 0; j < m; ++j) {
      to[i * to_i + j * to_j] = core::to_accumulation(from[i * from_i + j * from_j]);
    }
  }
}

// One position's products, added to the sums of `slot`.
template <int kVectors, bool kGroups, class A, int kRows, int kSums>
GHOSTGRAD_HD void multiply_position(const A* const (&row)[kRows], int64_t position, const A* b, int slot,
                                    Vector<A> (&registers)[kRows][kSums]) {
  Vector<A> columns[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) columns[v] = load_aligned(b + v * kLanes<A>);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    Vector<A> factor;
    if constexpr (kGroups) {
      factor = load(row[r] + position);
    } else {
      factor = row[r][position] - Vector<A>{};  // broadcast
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) registers[r][slot * kVectors + v] += columns[v] * factor;
  }
}

// sums[r][c] = sum_t box[row_offset[r] + position_offset[t]] * b[t][c], as multiply_panels. A single vector of columns
// takes two positions at a time, each with sums of its own: one sum after the other would wait for the adder.
template <class A, int kRows, int kVectors, bool kGroups>
__attribute__((noinline)) void multiply_box(const A* box, const int64_t* row_offset, const int64_t* position_offset,
                                            const A* b,  // (depth, kVectors * kLanes)
                                            int64_t depth,
                                            A* sums) {  // (kRows, kVectors * kLanes)
  constexpr int kLane = kLanes<A>, kPositions = kVectors == 1 ? 2 : 1;
  Vector<A> registers[kRows][kVectors * kPositions];
  const A* row[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    row[r] = box + row_offset[r];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors * kPositions; ++v) registers[r][v] = Vector<A>{};
  }
  int64_t t = 0;
  for (; t + kPositions <= depth; t += kPositions) {
#pragma GCC unroll 2
    for (int slot = 0; slot < kPositions; ++slot) {
      const int64_t at = t + slot;
      multiply_position<kVectors, kGroups>(row, position_offset[at], b + at * kVectors * kLane, slot, registers);
    }
  }
  if (t < depth) multiply_position<kVectors, kGroups>(row, position_offset[t], b + t * kVectors * kLane, 0, registers);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kPositions == 2) registers[r][v] += registers[r][kVectors + v];
      store(sums + (r * kVectors + v) * kLane, registers[r][v]);
    }
  }
}

// What all per-sample products together cost, epilogues included.
inline double product_operations(const core::Convolution& o) {
  return static_cast<double>(o.batch) * static_cast<double>(2 * o.positions() + 10) * static_cast<double>(o.elements());
}

// A range of positions in three dimensions.
struct Strip {
  int64_t begin[3], extent[3];
  int64_t depth() const { return extent[0] * extent[1] * extent[2]; }
};

template <class S>
class ConvProduct {
 public:
  using A = core::accumulation_t<S>;
  static constexpr int64_t kLane = kLanes<A>;
  static constexpr int64_t kMaxBlock = kConvRows * kNv * kLane;

  // How G_i is cut into tiles, and its positions into strips: by sizes alone.
  struct Cut {
    bool lanes_are_groups;
    int64_t group_tiles;     // groups, or vectors of groups
    int64_t columns;         // vectors of output channels of a group, or output channels
    Split column_tiles;      // of vectors
    Split channel_tiles;     // of the group's input channels
    Split strips[3];         // of positions
    int64_t box[3];          // extent of the box
    int64_t rows_per_block;  // kRows of the blocks

    int64_t tiles() const { return group_tiles * column_tiles.count * channel_tiles.count; }
    int64_t row_blocks(const core::Convolution& o, int64_t channels) const {
      return core::ceil_div(channels * o.offsets(), rows_per_block);
    }
    int64_t tile_elements(const core::Convolution& o) const {
      return column_tiles.size * kLane * row_blocks(o, channel_tiles.size) * rows_per_block;
    }
    int64_t box_elements() const {
      return channel_tiles.size * box[0] * box[1] * box[2] * (lanes_are_groups ? kLane : 1);
    }
    int64_t depth() const { return strips[0].size * strips[1].size * strips[2].size; }
    int64_t strip_count() const { return strips[0].count * strips[1].count * strips[2].count; }
  };

  static Cut cut(const core::Convolution& o) {
    Cut c;
    c.lanes_are_groups = o.groups > 1 && o.group_outputs() < core::minimum(kLane, o.groups);
    c.group_tiles = c.lanes_are_groups ? core::ceil_div(o.groups, kLane) : o.groups;
    c.columns = c.lanes_are_groups ? o.group_outputs() : core::ceil_div(o.group_outputs(), kLane);
    int64_t depth = 1;
    for (int i = 2; i >= 0; --i) {  // whole lines if they fit, then whole planes
      c.strips[i] = core::even_split(o.out[i], core::maximum(1, kDepth / depth), 1);
      depth *= c.strips[i].size;
      c.box[i] = (c.strips[i].size - 1) * o.stride[i] + (o.kernel[i] - 1) * o.dilation[i] + 1;
    }
    const int64_t box = c.box[0] * c.box[1] * c.box[2] * (c.lanes_are_groups ? kLane : 1);
    const int64_t channels = core::minimum(kConvTile / (4 * kLane) / o.offsets(), kBoxElements / box);
    c.channel_tiles = core::even_split(o.group_channels(), core::maximum(1, channels), 1);
    const int64_t rows = c.channel_tiles.size * o.offsets();
    c.column_tiles = core::even_split(c.columns, core::maximum(kNv, kConvTile / rows / kLane), kNv);
    // A block costs about one row more than it has.
    const auto cost = [rows](int64_t per_block) { return core::ceil_div(rows, per_block) * (per_block + 1); };
    c.rows_per_block = kConvRows;
    for (int64_t per_block = kConvRows - 3; per_block > 0; per_block -= 3) {
      if (cost(per_block) < cost(c.rows_per_block)) c.rows_per_block = per_block;
    }
    return c;
  }

  static size_t room(const core::Convolution& o, const Cut& c, bool wgrad, int64_t samples) {
    size_t bytes = Scratch::room<A>(c.column_tiles.size * kLane * c.depth()) + Scratch::room<A>(c.box_elements());
    bytes += Scratch::room<int64_t>(c.depth()) +
             Scratch::room<int64_t>(c.row_blocks(o, c.channel_tiles.size) * c.rows_per_block);
    if (c.strip_count() * o.runs > 1) bytes += Scratch::room<double>(c.tile_elements(o));
    if (wgrad) bytes += Scratch::room<A>(c.tile_elements(o));
    if (wgrad && samples > kSamplesPerFlush) bytes += Scratch::room<double>(c.tile_elements(o));
    return bytes;
  }

  ConvProduct(const core::Convolution& o, const Cut& c, bool wgrad, int64_t samples)
      : o_(o), c_(c), scratch_(room(o, c, wgrad, samples)) {
    packed_b_ = scratch_.take<A>(c.column_tiles.size * kLane * c.depth());
    box_ = scratch_.take<A>(c.box_elements());
    position_offset_ = scratch_.take<int64_t>(c.depth());
    row_offset_ = scratch_.take<int64_t>(c.row_blocks(o, c.channel_tiles.size) * c.rows_per_block);
    if (c.strip_count() * o.runs > 1) long_sums_ = scratch_.take<double>(c.tile_elements(o));
    if (wgrad) wgrad_ = scratch_.take<A>(c.tile_elements(o));
    if (wgrad && samples > kSamplesPerFlush) wgrad_total_ = scratch_.take<double>(c.tile_elements(o));
  }

  void select_tile(int64_t tile) {
    const int64_t channel_tile = tile % c_.channel_tiles.count, rest = tile / c_.channel_tiles.count;
    const int64_t column_tile = rest % c_.column_tiles.count;
    group_ = rest / c_.column_tiles.count * (c_.lanes_are_groups ? kLane : 1);
    channel_begin_ = c_.channel_tiles.begin(channel_tile);
    channels_ = c_.channel_tiles.end(channel_tile) - channel_begin_;
    column_begin_ = c_.column_tiles.begin(column_tile);
    columns_ = c_.column_tiles.end(column_tile) - column_begin_;
    rows_ = channels_ * o_.offsets();
    for (int i = 0; i < 3; ++i) filled_from_[i] = filled_to_[i] = -1;
    const int64_t element = c_.lanes_are_groups ? kLane : 1;
    int64_t row = 0;
    for (int64_t channel = 0; channel < channels_; ++channel) {
      for (int64_t z = 0; z < o_.kernel[0]; ++z) {
        for (int64_t y = 0; y < o_.kernel[1]; ++y) {
          for (int64_t x = 0; x < o_.kernel[2]; ++x, ++row) {
            row_offset_[row] = element * in_box(channel, z * o_.dilation[0], y * o_.dilation[1], x * o_.dilation[2]);
          }
        }
      }
    }
    // Rows that fill up the last block repeat the last one; nobody looks at their sums.
    for (; row < c_.row_blocks(o_, channels_) * c_.rows_per_block; ++row) row_offset_[row] = row_offset_[rows_ - 1];
  }

  // The sum of squares of the selected tile of G_i. With kWgrad, the tile is added to the running weight gradient.
  template <bool kWgrad>
  double add_sample(int64_t sample) {
    double squares = 0.0;
    bool first = true;
    for (int64_t run = 0; run < o_.runs; ++run) {
      for (int64_t z = 0; z < c_.strips[0].count; ++z) {
        for (int64_t y = 0; y < c_.strips[1].count; ++y) {
          for (int64_t x = 0; x < c_.strips[2].count; ++x) {
            const int64_t index[3] = {z, y, x};
            Strip strip;
            bool last = run + 1 == o_.runs;
            for (int i = 0; i < 3; ++i) {
              strip.begin[i] = c_.strips[i].begin(index[i]);
              strip.extent[i] = c_.strips[i].end(index[i]) - strip.begin[i];
              last = last && index[i] + 1 == c_.strips[i].count;
            }
            fill_box(sample, run, strip);
            pack_columns(sample, run, strip);
            squares += add_strip<kWgrad>(strip.depth(), first, last);
            first = false;
          }
        }
      }
    }
    return squares;
  }

  int64_t tile_elements() const { return c_.tile_elements(o_); }

  void clear_wgrad() {
    for (int64_t i = 0; i < tile_elements(); ++i) wgrad_[i] = A(0);
    if (wgrad_total_ == nullptr) return;
    for (int64_t i = 0; i < tile_elements(); ++i) wgrad_total_[i] = 0.0;
  }

  // Call every kSamplesPerFlush samples.
  void flush_wgrad() {
    if (wgrad_total_ == nullptr) return;
    for (int64_t i = 0; i < tile_elements(); ++i) {
      wgrad_total_[i] += static_cast<double>(wgrad_[i]);
      wgrad_[i] = A(0);
    }
  }

  // The running weight gradient of the selected tile, as it lies in blocks.
  const A* tile_wgrad() {
    flush_wgrad();
    if (wgrad_total_ != nullptr) {
      for (int64_t i = 0; i < tile_elements(); ++i) wgrad_[i] = static_cast<A>(wgrad_total_[i]);
    }
    return wgrad_;
  }

  // Writes a weight gradient that lies in blocks to its place in `to` (out_channels, channels / groups, *kernel).
  void store_wgrad(const A* blocks, S* to) const {
    const int64_t per_block = c_.rows_per_block;
    for (int64_t vector = 0; vector < columns_; ++vector) {
      const int64_t panel = vector / kNv, width = panel_width(panel);
      for (int64_t lane = 0; lane < valid_lanes(vector); ++lane) {
        const int64_t channel = output_channel(vector) + lane * output_lane();
        S* target = to + channel * o_.in_features() + channel_begin_ * o_.offsets();
        for (int64_t first = 0; first < rows_; first += per_block) {
          const A* block = blocks + panel_begin(panel) + first * width + vector % kNv * kLane + lane;
          const int64_t rows = core::minimum(per_block, rows_ - first);
          for (int64_t r = 0; r < rows; ++r) target[first + r] = core::from_accumulation<S>(block[r * width]);
        }
      }
    }
  }

 private:
  int64_t in_box(int64_t channel, int64_t z, int64_t y, int64_t x) const {
    return ((channel * c_.box[0] + z) * c_.box[1] + y) * c_.box[2] + x;
  }
  // Columns of a panel, whose last one may have a single vector.
  int64_t panel_width(int64_t panel) const { return core::minimum(kNv, columns_ - panel * kNv) * kLane; }
  // Where the blocks of a panel begin.
  int64_t panel_begin(int64_t panel) const {
    return panel * kNv * kLane * c_.row_blocks(o_, channels_) * c_.rows_per_block;
  }
  // The output channel of a vector's first lane, the distance to the next lane's, and how many there are.
  int64_t output_channel(int64_t vector) const {
    const int64_t column = column_begin_ + vector;
    return group_ * o_.group_outputs() + (c_.lanes_are_groups ? column : column * kLane);
  }
  int64_t output_lane() const { return c_.lanes_are_groups ? o_.group_outputs() : 1; }
  int64_t valid_lanes(int64_t vector) const {
    if (c_.lanes_are_groups) return core::minimum(kLane, o_.groups - group_);
    return core::minimum(kLane, o_.group_outputs() - (column_begin_ + vector) * kLane);
  }

  // The part of the image that a strip sees.
  void fill_box(int64_t sample, int64_t run, const Strip& strip) {
    const int64_t* strides = o_.x_strides;
    const S* image = static_cast<const S*>(o_.x) + sample * strides[0] + run * strides[1];
    int64_t begin[3], from[3], to[3];  // of the box in the image, and of what lies inside both, counted from the box
    bool inside = true;
    for (int i = 0; i < 3; ++i) {
      begin[i] = strip.begin[i] * o_.stride[i] - o_.padding[i];
      from[i] = core::maximum(0, -begin[i]);
      to[i] = core::maximum(from[i], core::minimum(c_.box[i], o_.size[i] - begin[i]));
      inside = inside && from[i] == 0 && to[i] == c_.box[i];
    }
    const int64_t lanes = c_.lanes_are_groups ? kLane : 1;
    const int64_t groups = c_.lanes_are_groups ? core::minimum(kLane, o_.groups - group_) : 1;
    bool margins_are_zero = true;  // since the last image, whose part lay in the same place
    for (int i = 0; i < 3; ++i) {
      margins_are_zero = margins_are_zero && filled_from_[i] == from[i] && filled_to_[i] == to[i];
      filled_from_[i] = from[i];
      filled_to_[i] = to[i];
    }
    if ((!inside || groups < lanes) && !margins_are_zero) {
      for (int64_t i = 0; i < channels_ * in_box(1, 0, 0, 0) * lanes; ++i) box_[i] = A(0);
    }
    // Lines that lie one behind the other, here and there, are copied as one.
    int64_t line = to[2] - from[2], lines = to[1] - from[1];
    if (line == c_.box[2] && strides[4] == line * strides[5]) {
      line *= lines;
      lines = core::minimum(lines, 1);
    }
    for (int64_t z = from[0]; z < to[0]; ++z) {
      for (int64_t y = from[1]; y < from[1] + lines; ++y) {
        const S* source = image + (begin[0] + z) * strides[3] + (begin[1] + y) * strides[4] +
                          (begin[2] + from[2]) * strides[5] +
                          (group_ * o_.group_channels() + channel_begin_) * strides[2];
        A* target = box_ + in_box(0, z, y, from[2]) * lanes;
        if (!c_.lanes_are_groups) {
          move(source, strides[5], strides[2], line, channels_, target, int64_t{1}, in_box(1, 0, 0, 0));
          continue;
        }
        for (int64_t channel = 0; channel < channels_; ++channel) {
          move(source + channel * strides[2], strides[5], o_.group_channels() * strides[2], line, groups,
               target + in_box(channel, 0, 0, 0) * lanes, lanes, int64_t{1});
        }
      }
    }
    place_positions(strip, lanes);
  }

  // Where the strip's positions begin in the box: written once for strips of the same extent.
  void place_positions(const Strip& strip, int64_t lanes) {
    bool placed = true;
    for (int i = 0; i < 3; ++i) {
      placed = placed && placed_extent_[i] == strip.extent[i];
      placed_extent_[i] = strip.extent[i];
    }
    if (placed) return;
    int64_t t = 0;
    for (int64_t z = 0; z < strip.extent[0]; ++z) {
      for (int64_t y = 0; y < strip.extent[1]; ++y) {
        for (int64_t x = 0; x < strip.extent[2]; ++x, ++t) {
          position_offset_[t] = lanes * in_box(0, z * o_.stride[0], y * o_.stride[1], x * o_.stride[2]);
        }
      }
    }
  }

  // The output gradients of a strip, in panels of kNv vectors, positions first.
  void pack_columns(int64_t sample, int64_t run, const Strip& strip) {
    const int64_t* strides = o_.b_strides;
    const S* gradients = static_cast<const S*>(o_.b) + sample * strides[0] + run * strides[1];
    const int64_t depth = strip.depth();
    // Lines, and planes, that lie one behind the other are read as one line.
    int64_t planes = strip.extent[0], lines = strip.extent[1], line = strip.extent[2];
    if (line == o_.out[2] && strides[4] == line * strides[5]) {
      line *= lines;
      lines = 1;
      if (line == o_.out[1] * o_.out[2] && strides[3] == line * strides[5]) {
        line *= planes;
        planes = 1;
      }
    }
    for (int64_t vector = 0; vector < columns_; ++vector) {
      const int64_t panel = vector / kNv, width = panel_width(panel);
      A* target = packed_b_ + panel * kNv * kLane * depth + vector % kNv * kLane;
      const int64_t lanes = valid_lanes(vector);
      for (int64_t z = 0; z < planes; ++z) {
        for (int64_t y = 0; y < lines; ++y) {
          const S* from = gradients + output_channel(vector) * strides[2] + (strip.begin[0] + z) * strides[3] +
                          (strip.begin[1] + y) * strides[4] + strip.begin[2] * strides[5];
          move(from, strides[5], output_lane() * strides[2], line, lanes, target, width, int64_t{1});
          for (int64_t t = 0; lanes < kLane && t < line; ++t) {
            for (int64_t lane = lanes; lane < kLane; ++lane) target[t * width + lane] = A(0);
          }
          target += line * width;
        }
      }
    }
  }

  template <bool kWgrad>
  double add_strip(int64_t depth, bool first, bool last) {
    const int64_t blocks = c_.row_blocks(o_, channels_), per_block = c_.rows_per_block;
    double squares = 0.0;
    for (int64_t panel = 0; panel * kNv < columns_; ++panel) {
      const int64_t vectors = core::minimum(kNv, columns_ - panel * kNv);
      Index<A> valid[kNv];
      for (int64_t v = 0; v < vectors; ++v) {
        for (int64_t lane = 0; lane < kLane; ++lane) valid[v][lane] = lane < valid_lanes(panel * kNv + v) ? -1 : 0;
      }
      const Multiply multiply = multiply_of(per_block, vectors, c_.lanes_are_groups);
      double panel_squares = 0.0;
      for (int64_t block = 0; block < blocks; ++block) {
        alignas(kVectorBytes) A sums[kMaxBlock];
        multiply(box_, row_offset_ + block * per_block, position_offset_, packed_b_ + panel * kNv * kLane * depth,
                 depth, sums);
        const int64_t at = panel_begin(panel) + block * per_block * vectors * kLane;
        if (!(first && last)) lengthen(long_sums_ + at, first, last, per_block * vectors * kLane, sums);
        if (!last) continue;
        const int64_t rows = core::minimum(per_block, rows_ - block * per_block);
        A* wgrad = kWgrad ? wgrad_ + at : nullptr;
        panel_squares += vectors == 1 ? add_block<1, kWgrad>(sums, rows, valid, wgrad)
                                      : add_block<kNv, kWgrad>(sums, rows, valid, wgrad);
      }
      squares += panel_squares;
    }
    return squares;
  }

  // Carries sums over from one strip to the next, in float64.
  static void lengthen(double* total, bool first, bool last, int64_t count, A* sums) {
    if (first) {
      for (int64_t i = 0; i < count; ++i) total[i] = static_cast<double>(sums[i]);
    } else if (!last) {
      for (int64_t i = 0; i < count; ++i) total[i] += static_cast<double>(sums[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) sums[i] = static_cast<A>(total[i] + static_cast<double>(sums[i]));
    }
  }

  // Lanes past the last output channel may hold 0 * inf by now and must not be looked at.
  template <int kVectors, bool kWgrad>
  static double add_block(const A* sums, int64_t rows, const Index<A>* valid, A* wgrad) {
    Vector<A> squares[kVectors] = {};
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = (r * kVectors + v) * kLane;
        const Vector<A> sum =
            reinterpret_cast<Vector<A>>(reinterpret_cast<Index<A>>(load_aligned(sums + at)) & valid[v]);
        squares[v] += sum * sum;
        if constexpr (kWgrad) *reinterpret_cast<Vector<A>*>(wgrad + at) += sum;
      }
    }
    double total = 0.0;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) total += static_cast<double>(horizontal_sum<A>(squares[v]));
    return total;
  }

  using Multiply = void (*)(const A*, const int64_t*, const int64_t*, const A*, int64_t, A*);
  static Multiply multiply_of(int64_t rows, int64_t vectors, bool lanes_are_groups) {
    if (lanes_are_groups) return vectors == 1 ? multiply_rows<1, true>(rows) : multiply_rows<kNv, true>(rows);
    return vectors == 1 ? multiply_rows<1, false>(rows) : multiply_rows<kNv, false>(rows);
  }
  template <int kVectors, bool kGroups>
  static Multiply multiply_rows(int64_t rows) {
    if constexpr (kConvRows > 6) {
      if (rows > 6) return multiply_box<A, kConvRows, kVectors, kGroups>;
    }
    return rows > 3 ? multiply_box<A, 6, kVectors, kGroups> : multiply_box<A, 3, kVectors, kGroups>;
  }

  const core::Convolution& o_;
  const Cut& c_;
  Scratch scratch_;
  A* packed_b_ = nullptr;               // (panels, depth, kNv, kLane)
  A* box_ = nullptr;                    // (channels, *box), times kLane
  int64_t* row_offset_ = nullptr;       // (row blocks, rows per block)
  int64_t* position_offset_ = nullptr;  // (depth)
  double* long_sums_ = nullptr;         // (panels, row blocks, rows per block, kNv, kLane), if there are several strips
  A* wgrad_ = nullptr;                  // the same
  double* wgrad_total_ = nullptr;       // the same, if there are many samples
  int64_t placed_extent_[3] = {-1, -1, -1};                              // of the strip that position_offset_ is for
  int64_t filled_from_[3] = {-1, -1, -1}, filled_to_[3] = {-1, -1, -1};  // the part of the box that an image fills
  int64_t group_ = 0, channel_begin_ = 0, channels_ = 0, column_begin_ = 0, columns_ = 0, rows_ = 0;
};

}  // namespace
}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
