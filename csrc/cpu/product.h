// The per-sample product G_i = b_i^T a_i, one tile at a time: the heart of outer_sqnorm, wgrad_sqnorm and
// wgrad_moments.
//
// Both operands have the inner dimension t first, a (T, p) and b (T, d), so G_i is a sum of outer products and needs no
// transposition. A *tile* is about 256 x 256 elements of G_i. For one tile the operands' columns are packed, kDepth
// positions at a time, into panels
//
//   of b: kMr columns wide, [t][kMr]          of a: kNr = kNv vectors wide, [t][kNr]
//
// so that the innermost loop reads both in order, whatever the strides were (rows 4 KiB apart would all fall into the
// same cache set), and so that widening from 16 bits happens once per element and not once per use. A packed element is
// used about 128 times. A *block* of kMr x kNr sums is kept in registers while t runs, then handed to the epilogue:
// squares to the sample's sum, weighted sum to the weight gradient, squares once more to their own sum over samples.
//
// Summation: at most kDepth products in a row are added in the accumulation type; longer T goes on in float64, block by
// block. Squares are added over the kMr * kNv vectors of a block in the accumulation type and from there on in float64.
#pragma once

#include "core/operands.h"
#include "core/tiles.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

using core::Split;

constexpr int64_t kDepth = 256;
constexpr int64_t kTileEdge = 256;
// Runs of samples whose weighted sum stays in the accumulation type before it moves on to float64.
constexpr int64_t kSamplesPerFlush = 64;

// The edge of a tile at most: a lone sample with few tiles gets smaller ones, so that threads find something to share.
inline int64_t tile_edge(const core::Operands& o) {
  constexpr int64_t kFewTiles = 4;
  const int64_t tiles = core::ceil_div(o.out_features, kTileEdge) * core::ceil_div(o.in_features, kTileEdge);
  return o.batch == 1 && tiles < kFewTiles ? kTileEdge / 2 : kTileEdge;
}

// One row of a panel, or one row of pairs from two rows.
template <int kWidth, class S>
GHOSTGRAD_HD void pack_row(const S* first, const S* second, int64_t columns, Factor<S>* to) {
  if (columns == kWidth && (kElements<S> == 1 || second != nullptr)) {
    for (int column = 0; column < kWidth; ++column) to[column] = factor(first + column, second + column);
    return;
  }
  for (int64_t column = 0; column < kWidth; ++column) {
    to[column] = column < columns ? factor(first + column, second == nullptr ? nullptr : second + column) : Factor<S>{};
  }
}

// Packs `columns` columns of `depth` rows into panels of factors; the last panel is filled up with zeros.
template <int kWidth, class S>
void pack(const S* from,  // (depth, columns), rows `stride` apart
          int64_t stride, int64_t depth, int64_t columns,
          Factor<S>* to) {       // (ceil(columns / kWidth), ceil(depth / kElements), kWidth)
  constexpr int64_t kSteps = 8;  // read together, so that a page is left for good and a panel written in a run
  const int64_t steps = core::ceil_div(depth, kElements<S>);
  const int64_t whole = columns / kWidth;
  const int64_t rest = columns - whole * kWidth;
  for (int64_t begin = 0; begin < steps; begin += kSteps) {
    const int64_t end = core::minimum(begin + kSteps, steps);
    for (int64_t panel = 0; panel <= whole; ++panel) {
      for (int64_t step = begin; step < end; ++step) {
        const S* first = from + step * kElements<S> * stride + panel * kWidth;
        const S* second = (step + 1) * kElements<S> <= depth ? first + stride : nullptr;  // of a pair
        Factor<S>* target = to + (panel * steps + step) * kWidth;
        if (panel < whole) {
          pack_row<kWidth>(first, second, kWidth, target);
        } else if (rest > 0) {
          pack_row<kWidth>(first, second, rest, target);
        }
      }
    }
  }
}

// sums[r][c] = sum_t b[t][r] * a[t][c]: the innermost loop of both ops, once per type. A function of its own, never
// inlined, and sums that leave registers once, at the end: where the compiler can see that someone points at them it
// keeps them in memory while t runs, at half the speed, and whether it does is luck.
template <class S, class A = core::accumulation_t<S>>
__attribute__((noinline)) void multiply_panels(const Factor<S>* b,  // (steps, kMr)
                                               const Factor<S>* a,  // (steps, kNr)
                                               int64_t steps,
                                               A* sums) {  // (kMr, kNr)
  constexpr int kNr = kNv * kLanes<A>;
  Vector<A> registers[kMr][kNv];
#pragma GCC unroll 16
  for (int r = 0; r < kMr; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kNv; ++v) registers[r][v] = Vector<A>{};
  }
  for (int64_t step = 0; step < steps; ++step) {
    Vector<A> columns[kNv];
#pragma GCC unroll 4
    for (int v = 0; v < kNv; ++v) memcpy(&columns[v], a + step * kNr + v * kLanes<A>, sizeof(columns[v]));
#pragma GCC unroll 16
    for (int r = 0; r < kMr; ++r) {
      const Factor<S> row = b[step * kMr + r];
#pragma GCC unroll 4
      for (int v = 0; v < kNv; ++v) registers[r][v] = multiply_add<S>(registers[r][v], columns[v], row);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kMr; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kNv; ++v) *reinterpret_cast<Vector<A>*>(sums + r * kNr + v * kLanes<A>) = registers[r][v];
  }
}

// What all per-sample products together cost, epilogues included.
inline double product_operations(const core::Operands& o) {
  return static_cast<double>(o.batch) * static_cast<double>(2 * o.positions + 10) * static_cast<double>(o.in_features) *
         static_cast<double>(o.out_features);
}

// What is summed over samples, element by element, beside each sample's squared norm.
enum class Sums { kNone, kWgrad, kMoments };  // nothing; c_i G_i; c_i G_i and G_i^2

template <class S, Sums kSums>
class TileProduct {
 public:
  using A = core::accumulation_t<S>;
  static constexpr int kNr = kNv * kLanes<A>;
  static constexpr int kBlock = kMr * kNr;
  static constexpr int kRunning = static_cast<int>(kSums);  // sums that are kept

  // The cut of G_i into tiles depends on its size alone.
  static Split row_split(const core::Operands& o) { return core::even_split(o.out_features, tile_edge(o), kMr); }
  static Split column_split(const core::Operands& o) { return core::even_split(o.in_features, tile_edge(o), kNr); }

  // `samples`: how many samples one tile sees at most.
  static size_t room(const core::Operands& o, Split rows, Split columns, int64_t samples) {
    const int64_t elements = rows.size * columns.size;
    const int64_t steps = core::ceil_div(core::minimum(o.positions, kDepth), kElements<S>);
    size_t bytes = Scratch::room<Factor<S>>(rows.size * steps) + Scratch::room<Factor<S>>(columns.size * steps);
    if (o.positions > kDepth) bytes += Scratch::room<double>(elements);
    size_t running = Scratch::room<A>(elements);
    if (samples > kSamplesPerFlush) running += Scratch::room<double>(elements);
    return bytes + kRunning * running;
  }

  TileProduct(const core::Operands& o, Split rows, Split columns, int64_t samples)
      : o_(o), rows_(rows), columns_(columns), scratch_(room(o, rows, columns, samples)) {
    const int64_t steps = core::ceil_div(core::minimum(o.positions, kDepth), kElements<S>);
    const int64_t elements = rows.size * columns.size;
    packed_b_ = scratch_.take<Factor<S>>(rows.size * steps);
    packed_a_ = scratch_.take<Factor<S>>(columns.size * steps);
    if (o.positions > kDepth) long_sums_ = scratch_.take<double>(elements);
    for (int k = 0; k < kRunning; ++k) {
      running_[k].sum = scratch_.take<A>(elements);
      if (samples > kSamplesPerFlush) running_[k].total = scratch_.take<double>(elements);
    }
  }

  void select_tile(int64_t row_tile, int64_t column_tile) {
    row_begin_ = rows_.begin(row_tile);
    column_begin_ = columns_.begin(column_tile);
    tile_rows_ = rows_.end(row_tile) - row_begin_;
    tile_columns_ = columns_.end(column_tile) - column_begin_;
  }

  // The sum of squares of the selected tile of G_i. To the running sums, weight * tile and the tile's squares are
  // added.
  double add_sample(int64_t sample, A weight) {
    const int64_t row_panels = core::ceil_div(tile_rows_, kMr), column_panels = core::ceil_div(tile_columns_, kNr);
    double squares = 0.0;
    for (int64_t t = 0; t < o_.positions; t += kDepth) {
      const int64_t depth = core::minimum(kDepth, o_.positions - t), steps = core::ceil_div(depth, kElements<S>);
      const bool first = t == 0, last = t + depth == o_.positions;
      pack<kMr>(static_cast<const S*>(o_.b) + sample * o_.b_batch_stride + t * o_.b_position_stride + row_begin_,
                o_.b_position_stride, depth, tile_rows_, packed_b_);
      pack<kNr>(static_cast<const S*>(o_.a) + sample * o_.a_batch_stride + t * o_.a_position_stride + column_begin_,
                o_.a_position_stride, depth, tile_columns_, packed_a_);
      for (int64_t column_panel = 0; column_panel < column_panels; ++column_panel) {
        double panel_squares = 0.0;
        for (int64_t row_panel = 0; row_panel < row_panels; ++row_panel) {
          const int64_t block = column_panel * row_panels + row_panel;
          alignas(kVectorBytes) A sums[kBlock];
          multiply_panels<S>(packed_b_ + row_panel * steps * kMr, packed_a_ + column_panel * steps * kNr, steps, sums);
          if (!(first && last)) lengthen(long_sums_ + block * kBlock, first, sums);
          if (!last) continue;
          const int64_t valid_rows = core::minimum(kMr, tile_rows_ - row_panel * kMr);
          const int64_t valid_columns = core::minimum(kNr, tile_columns_ - column_panel * kNr);
          panel_squares += valid_rows == kMr && valid_columns == kNr
                               ? whole_block(sums, weight, block * kBlock)
                               : partial_block(sums, weight, block * kBlock, valid_rows, valid_columns);
        }
        squares += panel_squares;
      }
      if (last) begun_ = true;
    }
    return squares;
  }

  void clear_sums() {
    begun_ = false;
    for (RunningSum& running : running_) {
      if (running.total == nullptr) continue;
      for (int64_t i = 0; i < rows_.size * columns_.size; ++i) running.total[i] = 0.0;
    }
  }

  // Call every kSamplesPerFlush samples.
  void flush_sums() {
    if (!begun_) return;
    for (RunningSum& running : running_) {
      if (running.total == nullptr) return;  // the tile sees too few samples for that
      for (int64_t i = 0; i < rows_.size * columns_.size; ++i) running.total[i] += static_cast<double>(running.sum[i]);
    }
    begun_ = false;
  }

  // Write the running sums of the selected tile to their place in `to` (d, p), as S or as A.
  template <class Out>
  void store_wgrad(Out* to) {
    store(running_[0], to);
  }
  template <class Out>
  void store_squares(Out* to) {
    static_assert(kSums == Sums::kMoments, "squares are summed for the moments alone");
    store(running_[1], to);
  }

 private:
  // Carries sums over from one run of kDepth positions to the next, in float64.
  static void lengthen(double* total, bool first, A* sums) {
    for (int i = 0; i < kBlock; ++i) {
      total[i] = first ? static_cast<double>(sums[i]) : total[i] + static_cast<double>(sums[i]);
      sums[i] = static_cast<A>(total[i]);
    }
  }

  struct RunningSum {
    A* sum = nullptr;         // (blocks, kMr, kNr)
    double* total = nullptr;  // the same, if there are many samples
  };

  template <class Out>
  void store(const RunningSum& running, Out* to) {
    flush_sums();
    const int64_t row_panels = core::ceil_div(tile_rows_, kMr), column_panels = core::ceil_div(tile_columns_, kNr);
    for (int64_t row = 0; row < tile_rows_; ++row) {
      for (int64_t panel = 0; panel < column_panels; ++panel) {
        Out* target = to + (row_begin_ + row) * o_.in_features + column_begin_ + panel * kNr;
        const int64_t from = (panel * row_panels + row / kMr) * kBlock + (row % kMr) * kNr;
        const int64_t columns = core::minimum(kNr, tile_columns_ - panel * kNr);
        if (running.total != nullptr) {
          const double* total = running.total + from;
          for (int64_t c = 0; c < columns; ++c) target[c] = core::from_accumulation<Out>(static_cast<A>(total[c]));
        } else if (begun_) {
          const A* sum = running.sum + from;
          for (int64_t c = 0; c < columns; ++c) target[c] = core::from_accumulation<Out>(sum[c]);
        } else {  // no sample, or no position
          for (int64_t c = 0; c < columns; ++c) target[c] = core::from_accumulation<Out>(A(0));
        }
      }
    }
  }

  void add_vector(A* running, Vector<A> value) const {
    Vector<A>& sum = *reinterpret_cast<Vector<A>*>(running);
    sum = begun_ ? sum + value : value;
  }

  // The epilogue of a block that starts at element `block` of the running sums.
  double whole_block(const A* sums, A weight, int64_t block) const {
    A* wgrad = running_[0].sum + block;
    A* moment = running_[kRunning - 1 > 0 ? 1 : 0].sum + block;
    Vector<A> squares[kNv] = {};
#pragma GCC unroll 16
    for (int r = 0; r < kMr; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kNv; ++v) {
        const int at = r * kNr + v * kLanes<A>;
        const Vector<A> sum = load_aligned(sums + at);
        squares[v] += sum * sum;
        if constexpr (kSums != Sums::kNone) add_vector(wgrad + at, sum * weight);
        if constexpr (kSums == Sums::kMoments) add_vector(moment + at, sum * sum);
      }
    }
    double total = 0.0;
#pragma GCC unroll 4
    for (int v = 0; v < kNv; ++v) total += static_cast<double>(horizontal_sum<A>(squares[v]));
    return total;
  }

  // A block that sticks out of the matrix. What was padded with zeros may hold 0 * inf by now and must not be looked
  // at.
  double partial_block(const A* sums, A weight, int64_t block, int64_t rows, int64_t columns) const {
    if (!begun_) {
      for (int k = 0; k < kRunning; ++k) {
        for (int i = 0; i < kBlock; ++i) running_[k].sum[block + i] = A(0);
      }
    }
    double total = 0.0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        const A value = sums[r * kNr + c];
        total += static_cast<double>(value * value);
        if constexpr (kSums != Sums::kNone) running_[0].sum[block + r * kNr + c] += weight * value;
        if constexpr (kSums == Sums::kMoments) running_[1].sum[block + r * kNr + c] += value * value;
      }
    }
    return total;
  }

  const core::Operands& o_;
  Split rows_, columns_;
  Scratch scratch_;
  Factor<S>* packed_a_ = nullptr;  // (ceil(tile columns / kNr), steps, kNr)
  Factor<S>* packed_b_ = nullptr;  // (ceil(tile rows / kMr), steps, kMr)
  double* long_sums_ = nullptr;    // (blocks, kMr, kNr), if T > kDepth
  RunningSum running_[kRunning == 0 ? 1 : kRunning];
  bool begun_ = false;  // the running sums hold something: the first sample writes, later ones add
  int64_t row_begin_ = 0, column_begin_ = 0, tile_rows_ = 0, tile_columns_ = 0;
};

}  // namespace
}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
