// affine_sqnorm on the CPU: gradients of a scale and a shift, summed over the batch and their squared norms, at the
// speed of reading the operands once.
//
// A unit of work is a strip of channels for a run of samples. Per sample and tile of the strip, positions go by in runs
// of at most kRun whose sums are kept in the accumulation type, then move on to float64, in which everything else
// happens: the sample's squares are added to its partial, the sample itself to the tile of the totals. Runs of samples
// have totals of their own, at most kUnits of them, which are added in order at the end.
#include "core/operands.h"
#include "core/reduce.h"
#include "core/storage.h"
#include "core/tiles.h"
#include "cpu/affine_sums.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

constexpr int64_t kTile = 512;  // channels

// Adds kRows rows of channels, starting at channel c.
template <class V, Form kForm, int kRows, class S, class A>
GHOSTGRAD_HD void add_channels(int64_t c, const S* b, int64_t b_stride, const S* x, int64_t x_stride, const A* mean,
                               const A* rstd, A* shift, A* scale) {
  V shifts[kRows], scales[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    shifts[r] = load_as<V>(b + r * b_stride + c);
    if constexpr (kForm != Form::kShift) {
      V value = load_as<V>(x + r * x_stride + c);
      if constexpr (kForm == Form::kPerPosition) value = (value - mean[r]) * rstd[r];
      if constexpr (kForm == Form::kPerChannel) value = (value - load_as<V>(mean + c)) * load_as<V>(rstd + c);
      scales[r] = value * shifts[r];
    }
  }
  if constexpr (kRows == 4) {
    shifts[0] = (shifts[0] + shifts[1]) + (shifts[2] + shifts[3]);
    if constexpr (kForm != Form::kShift) scales[0] = (scales[0] + scales[1]) + (scales[2] + scales[3]);
  }
  store_as(shift + c, load_as<V>(shift + c) + shifts[0]);
  if constexpr (kForm != Form::kShift) store_as(scale + c, load_as<V>(scale + c) + scales[0]);
}

template <Form kForm, int kRows, class S, class A>
void add_rows(int64_t width, const S* b, int64_t b_stride, const S* x, int64_t x_stride, const A* mean, const A* rstd,
              A* shift, A* scale) {
  int64_t c = 0;
  for (; c + kLanes<A> <= width; c += kLanes<A>) {
    add_channels<Vector<A>, kForm, kRows>(c, b, b_stride, x, x_stride, mean, rstd, shift, scale);
  }
  for (; c < width; ++c) add_channels<A, kForm, kRows>(c, b, b_stride, x, x_stride, mean, rstd, shift, scale);
}

// The gradients of one sample's tile of channels, one tile at a time. Memory: some 16 KiB at most.
template <Form kForm, class S>
class SampleTile {
  using A = core::accumulation_t<S>;

 public:
  // For tiles of at most `room` channels, a multiple of kGranule.
  SampleTile(const core::Affine& affine, int64_t room)
      : o_(affine),
        room_(room),
        scratch_(2 * Scratch::room<double>(room) + 4 * Scratch::room<A>(room)),
        shift_(scratch_.take<double>(room)),
        scale_(scratch_.take<double>(room)),
        shift_run_(scratch_.take<A>(room)),
        scale_run_(scratch_.take<A>(room)),
        channel_mean_(scratch_.take<A>(room)),
        channel_rstd_(scratch_.take<A>(room)) {}

  // Sums the positions of channels [first, first + width) of a sample. What follows them in the tile is zero.
  void add_positions(int64_t sample, int64_t first, int64_t width) {
    if (!one_run_) {
      clear(shift_);
      if (kForm != Form::kShift) clear(scale_);
    }
    const S* b = static_cast<const S*>(o_.b) + sample * o_.b_batch_stride + first * o_.b_channel_stride;
    const S* x = kForm == Form::kShift
                     ? nullptr
                     : static_cast<const S*>(o_.x) + sample * o_.x_batch_stride + first * o_.x_channel_stride;
    if (o_.after != 1) {
      for (int64_t t = 0; t < o_.before; ++t) {
        for (int64_t c = 0; c < width; ++c) {
          const int64_t group = kForm == Form::kPerPosition ? group_of(first + c) : 0;
          add_pixels<kForm>(o_.after, b + t * o_.b_before_stride + c * o_.b_channel_stride,
                            kForm == Form::kShift ? x : x + t * o_.x_before_stride + c * o_.x_channel_stride,
                            mean(sample, t, group), rstd(sample, t, group), shift_ + c, scale_ + c);
        }
      }
      return;
    }
    for (int64_t begin = 0; begin < o_.before; begin += kRun) {
      const int64_t end = core::minimum(o_.before, begin + kRun);
      clear(shift_run_);
      if (kForm != Form::kShift) clear(scale_run_);
      int64_t t = begin;
      if constexpr (kForm != Form::kPerChannel) {
        for (; t + 4 <= end; t += 4) add_rows_at<4>(sample, t, width, b, x);
      }
      for (; t < end; ++t) {
        if (kForm == Form::kPerChannel && (t == 0 || varies_)) spread_statistics(sample, t, first, width);
        add_rows_at<1>(sample, t, width, b, x);
      }
      if (!one_run_) {
        widen(shift_run_, shift_);
        if (kForm != Form::kShift) widen(scale_run_, scale_);
      }
    }
  }

  // Adds the squares of the sums up, and the sums to a total if there is one.
  double square_and_add_shift(double* total) const {
    return one_run_ ? square_and_add(shift_run_, room_, total) : square_and_add(shift_, room_, total);
  }
  double square_and_add_scale(double* total) const {
    return one_run_ ? square_and_add(scale_run_, room_, total) : square_and_add(scale_, room_, total);
  }

 private:
  template <class T>
  void clear(T* values) const {
    memset(values, 0, static_cast<size_t>(room_) * sizeof(T));
  }
  void widen(const A* run, double* sums) const {
    for (int64_t c = 0; c < room_; c += kLanes<double>) store_as(sums + c, load(sums + c) + load_wide(run + c));
  }

  template <int kRows>
  void add_rows_at(int64_t sample, int64_t t, int64_t width, const S* b, const S* x) {
    A means[kRows], rstds[kRows];
    if constexpr (kForm == Form::kPerPosition) {
      for (int r = 0; r < kRows; ++r) {
        means[r] = mean(sample, t + r, 0);
        rstds[r] = rstd(sample, t + r, 0);
      }
    }
    const bool spread = kForm == Form::kPerChannel;
    add_rows<kForm, kRows>(width, b + t * o_.b_before_stride, o_.b_before_stride,
                           kForm == Form::kShift ? x : x + t * o_.x_before_stride, o_.x_before_stride,
                           spread ? channel_mean_ : means, spread ? channel_rstd_ : rstds, shift_run_, scale_run_);
  }

  int64_t group_of(int64_t channel) const { return channel * o_.groups / o_.channels; }
  A mean(int64_t sample, int64_t t, int64_t group) const {
    if (o_.mean == nullptr) return A(0);
    return static_cast<const A*>(
        o_.mean)[sample * o_.mean_batch_stride + t * o_.mean_before_stride + group * o_.mean_group_stride];
  }
  A rstd(int64_t sample, int64_t t, int64_t group) const {
    if (o_.rstd == nullptr) return A(1);
    return static_cast<const A*>(
        o_.rstd)[sample * o_.rstd_batch_stride + t * o_.rstd_before_stride + group * o_.rstd_group_stride];
  }
  // Each channel's statistics from its group's.
  void spread_statistics(int64_t sample, int64_t t, int64_t first, int64_t width) {
    for (int64_t c = 0; c < width; ++c) {
      const int64_t group = group_of(first + c);
      channel_mean_[c] = mean(sample, t, group);
      channel_rstd_[c] = rstd(sample, t, group);
    }
  }

  const core::Affine& o_;
  const int64_t room_;
  Scratch scratch_;
  double *shift_, *scale_;
  A *shift_run_, *scale_run_, *channel_mean_, *channel_rstd_;
  const bool one_run_ = o_.after == 1 && o_.before > 0 && o_.before <= kRun;  // then its sums are all there is
  const bool varies_ = o_.mean_before_stride != 0 || o_.rstd_before_stride != 0;
};

template <Form kForm, class S>
void run_form(const core::Affine& o, const core::AffineResults& results, ParallelFor parallel) {
  using A = core::accumulation_t<S>;
  constexpr bool kScale = kForm != Form::kShift;
  const int64_t run_length = core::maximum(1, core::ceil_div(o.batch, kUnits));
  const int64_t runs = core::ceil_div(o.batch, run_length);
  // Few samples: narrower tiles, so that there are units of work enough.
  const int64_t limit = core::maximum(kGranule, core::minimum(kTile, o.channels * core::maximum(1, runs) / kUnits));
  const core::Split tiles = core::even_split(o.channels, limit, kGranule);
  const bool total = results.shift != nullptr;

  const int64_t room = tiles.size, padded = tiles.count * room;
  const int64_t totals = total ? runs * padded : 0;
  Scratch scratch(2 * (Scratch::room<double>(o.batch * tiles.count) + Scratch::room<double>(totals)));
  double* shift_partial = scratch.take<double>(o.batch * tiles.count);  // (B, tiles)
  double* scale_partial = scratch.take<double>(o.batch * tiles.count);
  double* shift_total = scratch.take<double>(totals);  // (runs, tiles, room)
  double* scale_total = scratch.take<double>(totals);
  // A unit goes through its samples' rows tile by tile, as they lie in memory.
  const core::Split strips =
      core::even_split(tiles.count, core::ceil_div(tiles.count * core::maximum(1, runs), kUnits), 1);
  auto body = [&](int64_t begin, int64_t end) {
    SampleTile<kForm, S> sums(o, room);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t this_run = unit / strips.count, strip = unit % strips.count;
      const int64_t first_tile = strips.begin(strip), last_tile = strips.end(strip);
      const int64_t at = (this_run * tiles.count + first_tile) * room;
      const size_t bytes = static_cast<size_t>((last_tile - first_tile) * room) * sizeof(double);
      if (total) memset(shift_total + at, 0, bytes);
      if (total && kScale) memset(scale_total + at, 0, bytes);
      const int64_t last = core::minimum((this_run + 1) * run_length, o.batch);
      for (int64_t i = this_run * run_length; i < last; ++i) {
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
          sums.add_positions(i, tiles.begin(tile), tiles.end(tile) - tiles.begin(tile));
          const int64_t place = (this_run * tiles.count + tile) * room;
          shift_partial[i * tiles.count + tile] = sums.square_and_add_shift(total ? shift_total + place : nullptr);
          if (!kScale) continue;
          scale_partial[i * tiles.count + tile] = sums.square_and_add_scale(total ? scale_total + place : nullptr);
        }
      }
    }
  };
  const double elements = static_cast<double>(o.batch * o.before) * static_cast<double>(o.channels * o.after);
  parallel(runs * strips.count, 8.0 * elements, body);

  const auto finish = [&](const double* run_totals, const double* partial, void* sum, void* sqnorm) {
    for (int64_t c = 0; total && c < o.channels; ++c) {
      static_cast<A*>(sum)[c] = static_cast<A>(core::pairwise_sum(run_totals + c, runs, padded));
    }
    for (int64_t i = 0; i < o.batch; ++i) {
      static_cast<A*>(sqnorm)[i] = static_cast<A>(core::pairwise_sum(partial + i * tiles.count, tiles.count, 1));
    }
  };
  finish(shift_total, shift_partial, results.shift, results.shift_sqnorm);
  if (kScale) finish(scale_total, scale_partial, results.scale, results.scale_sqnorm);
}

template <class S>
void run(const core::Affine& o, const core::AffineResults& results, ParallelFor parallel) {
  if (!o.scaled) return run_form<Form::kShift, S>(o, results, parallel);
  if (o.mean == nullptr && o.rstd == nullptr) return run_form<Form::kPlain, S>(o, results, parallel);
  // Where positions are adjacent, a channel is summed by itself and has its statistics for itself.
  if (o.groups == 1 || o.after != 1) return run_form<Form::kPerPosition, S>(o, results, parallel);
  return run_form<Form::kPerChannel, S>(o, results, parallel);
}

}  // namespace

void affine_sqnorm(const core::Affine& affine, const core::AffineResults& results, ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(affine.dtype, run, affine, results, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
