// norm_affine on the CPU: the backward of a layer that normalises, scales and shifts, in one go. The gradient of its
// input needs two sums over what was normalised together, and those of scale and shift are sums of the same products:
//
//   x^ = (x - mean) rstd,  p = mean over the group of w b,  q = mean over the group of w b x^
//   gradient of x = rstd (w b - p - x^ q),  of the scale = sum b x^,  of the shift = sum b
//
// So what is normalised together, a row of channels or the images of some channels, is read from memory once, to be
// summed, and once more while it is still in cache, to be written.
//
// A unit of work is a run of samples, at most kUnits of them, with totals of its own, which are added in order at the
// end; of few samples it is a piece of one, and the pieces' sums are added first. Precision is that of affine_sqnorm.
#include "core/operands.h"
#include "core/reduce.h"
#include "core/storage.h"
#include "core/tiles.h"
#include "cpu/affine_sums.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

constexpr int64_t kRowsPerPiece = 32;

// What the gradient of x is made of, besides the operands: factor b + (x - mean) along + constant.
template <class A>
struct Coefficients {
  A mean, rstd, along, constant;

  // From sums over `count` elements of w b and w b x^.
  Coefficients(A mean, A rstd, double plain, double scaled, double count)
      : mean(mean),
        rstd(rstd),
        along(static_cast<A>(-static_cast<double>(rstd) * static_cast<double>(rstd) * scaled / count)),
        constant(static_cast<A>(-static_cast<double>(rstd) * plain / count)) {}
};

// Writes the gradient of adjacent elements, whose weights are adjacent too or all the same. Coefficients come by value:
// they are not reloaded whenever a gradient was stored.
template <class V, bool kWeights, class S, class A>
GHOSTGRAD_HD void write_gradient_at(int64_t at, const S* b, const S* x, const A* weight, A factor,
                                    Coefficients<A> coefficients, S* gradient) {
  const V centred = load_as<V>(x + at) - coefficients.mean;
  V value = load_as<V>(b + at) * factor;
  if constexpr (kWeights) value = value * load_as<V>(weight + at);
  value = value + (centred * coefficients.along + coefficients.constant);
  if constexpr (sizeof(V) == kVectorBytes) {
    store(gradient + at, value);
  } else {
    gradient[at] = core::from_accumulation<S>(value);
  }
}
template <bool kWeights, class S, class A>
void write_gradient(int64_t length, const S* b, const S* x, const A* weight, Coefficients<A> coefficients,
                    S* gradient) {
  const A factor = kWeights ? coefficients.rstd : *weight * coefficients.rstd;
  int64_t at = 0;
  for (; at + kLanes<A> <= length; at += kLanes<A>) {
    write_gradient_at<Vector<A>, kWeights>(at, b, x, weight, factor, coefficients, gradient);
  }
  for (; at < length; ++at) write_gradient_at<A, kWeights>(at, b, x, weight, factor, coefficients, gradient);
}

// Adds kRows rows at channel c to the channels' sums, and their products with the weights to the rows' sums.
template <class V, int kRows, class S, class A>
GHOSTGRAD_HD void add_rows_at(int64_t c, const S* b, int64_t b_stride, const S* x, int64_t x_stride, const A* weight,
                              const A* mean, const A* rstd, A* shift, A* scale, V (&plain)[kRows], V (&scaled)[kRows]) {
  const V factor = load_as<V>(weight + c);
  V shifts[kRows], scales[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    shifts[r] = load_as<V>(b + r * b_stride + c);
    scales[r] = (load_as<V>(x + r * x_stride + c) - mean[r]) * rstd[r] * shifts[r];
    plain[r] += factor * shifts[r];
    scaled[r] += factor * scales[r];
  }
  if constexpr (kRows == 4) {
    shifts[0] = (shifts[0] + shifts[1]) + (shifts[2] + shifts[3]);
    scales[0] = (scales[0] + scales[1]) + (scales[2] + scales[3]);
  }
  store_as(shift + c, load_as<V>(shift + c) + shifts[0]);
  store_as(scale + c, load_as<V>(scale + c) + scales[0]);
}

// A sample's gradients, from positions whose channels are adjacent (rows) or channels whose positions are (images).
template <class S>
class NormSample {
 public:
  using A = core::accumulation_t<S>;

  // `room`: for the channels, a multiple of kGranule.
  NormSample(const core::Normalisation& normalisation, const A* weight, int64_t room)
      : n_(normalisation),
        o_(normalisation.affine),
        weight_(weight),
        room_(room),
        scratch_(2 * (Scratch::room<double>(room) + Scratch::room<A>(room))),
        shift_(scratch_.take<double>(room)),
        scale_(scratch_.take<double>(room)),
        shift_run_(scratch_.take<A>(room)),
        scale_run_(scratch_.take<A>(room)) {}

  // What is normalised together within a sample can be divided among units: rows, or groups of a position's channels.
  static int64_t items(const core::Affine& o) { return o.after == 1 ? o.before : o.before * o.groups; }

  // Writes the gradient of items [begin, end) and sums them up, for all channels.
  void run(int64_t sample, int64_t begin, int64_t end) {
    one_run_ = o_.after == 1 && begin < end && end - begin <= kRun;  // then its sums are all there is
    for (int64_t c = 0; !one_run_ && c < room_; ++c) shift_[c] = scale_[c] = 0.0;
    if (o_.after != 1) {
      for (int64_t item = begin; item < end; ++item) run_images(sample, item / o_.groups, item % o_.groups);
      return;
    }
    for (int64_t first = begin; first < end; first += kRun) {
      const int64_t last = core::minimum(end, first + kRun);
      for (int64_t c = 0; c < room_; ++c) shift_run_[c] = scale_run_[c] = A(0);
      int64_t t = first;
      for (; t + 4 <= last; t += 4) run_rows<4>(sample, t);
      for (; t < last; ++t) run_rows<1>(sample, t);
      for (int64_t c = 0; !one_run_ && c < room_; c += kLanes<double>) {
        store_as(shift_ + c, load(shift_ + c) + load_wide(shift_run_ + c));
        store_as(scale_ + c, load(scale_ + c) + load_wide(scale_run_ + c));
      }
    }
  }

  // Adds the squares of the sums up, and the sums to a total.
  double square_and_add_shift(double* total) const {
    return one_run_ ? square_and_add(shift_run_, room_, total) : square_and_add(shift_, room_, total);
  }
  double square_and_add_scale(double* total) const {
    return one_run_ ? square_and_add(scale_run_, room_, total) : square_and_add(scale_, room_, total);
  }

 private:
  int64_t group_channels() const { return o_.channels / o_.groups; }
  double count() const { return static_cast<double>(group_channels() * o_.after); }
  const S* b_at(int64_t sample, int64_t t, int64_t c) const {
    return static_cast<const S*>(o_.b) + sample * o_.b_batch_stride + t * o_.b_before_stride + c * o_.b_channel_stride;
  }
  const S* x_at(int64_t sample, int64_t t, int64_t c) const {
    return static_cast<const S*>(o_.x) + sample * o_.x_batch_stride + t * o_.x_before_stride + c * o_.x_channel_stride;
  }
  S* gradient_at(int64_t sample, int64_t t, int64_t c) const {
    return static_cast<S*>(n_.gradient) + sample * n_.batch_stride + t * n_.before_stride + c * o_.after;
  }
  A mean(int64_t sample, int64_t t, int64_t group) const {
    return static_cast<const A*>(
        o_.mean)[sample * o_.mean_batch_stride + t * o_.mean_before_stride + group * o_.mean_group_stride];
  }
  A rstd(int64_t sample, int64_t t, int64_t group) const {
    return static_cast<const A*>(
        o_.rstd)[sample * o_.rstd_batch_stride + t * o_.rstd_before_stride + group * o_.rstd_group_stride];
  }

  template <int kRows>
  void run_rows(int64_t sample, int64_t t) {
    const int64_t width = group_channels();
    for (int64_t group = 0; group < o_.groups; ++group) {
      const int64_t channel = group * width;
      const S *b = b_at(sample, t, channel), *x = x_at(sample, t, channel);
      const A* weight = weight_ + channel;
      A means[kRows], rstds[kRows];
      for (int r = 0; r < kRows; ++r) {
        means[r] = mean(sample, t + r, group);
        rstds[r] = rstd(sample, t + r, group);
      }
      double plain[kRows] = {}, scaled[kRows] = {};
      for (int64_t first = 0; first < width; first += kPixelRun) {
        const int64_t last = core::minimum(width, first + kPixelRun);
        Vector<A> plains[kRows] = {}, scaleds[kRows] = {};
        A plain_rest[kRows] = {}, scaled_rest[kRows] = {};
        int64_t c = first;
        for (; c + kLanes<A> <= last; c += kLanes<A>) {
          add_rows_at<Vector<A>, kRows>(c, b, o_.b_before_stride, x, o_.x_before_stride, weight, means, rstds,
                                        shift_run_ + channel, scale_run_ + channel, plains, scaleds);
        }
        for (; c < last; ++c) {
          add_rows_at<A, kRows>(c, b, o_.b_before_stride, x, o_.x_before_stride, weight, means, rstds,
                                shift_run_ + channel, scale_run_ + channel, plain_rest, scaled_rest);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          plain[r] += static_cast<double>(horizontal_sum<A>(plains[r]) + plain_rest[r]);
          scaled[r] += static_cast<double>(horizontal_sum<A>(scaleds[r]) + scaled_rest[r]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        const Coefficients<A> coefficients(means[r], rstds[r], plain[r], scaled[r], count());
        write_gradient<true>(width, b + r * o_.b_before_stride, x + r * o_.x_before_stride, weight, coefficients,
                             gradient_at(sample, t + r, channel));
      }
    }
  }

  void run_images(int64_t sample, int64_t t, int64_t group) {
    const int64_t first = group * group_channels(), last = first + group_channels();
    const A group_mean = mean(sample, t, group), group_rstd = rstd(sample, t, group);
    double plain = 0.0, scaled = 0.0;
    for (int64_t c = first; c < last; ++c) {
      double of_shift = 0.0, of_scale = 0.0;
      add_pixels<Form::kPerPosition>(o_.after, b_at(sample, t, c), x_at(sample, t, c), group_mean, group_rstd,
                                     &of_shift, &of_scale);
      shift_[c] += of_shift;
      scale_[c] += of_scale;
      plain += static_cast<double>(weight_[c]) * of_shift;
      scaled += static_cast<double>(weight_[c]) * of_scale;
    }
    const Coefficients<A> coefficients(group_mean, group_rstd, plain, scaled, count());
    for (int64_t c = first; c < last; ++c) {
      write_gradient<false>(o_.after, b_at(sample, t, c), x_at(sample, t, c), weight_ + c, coefficients,
                            gradient_at(sample, t, c));
    }
  }

  const core::Normalisation& n_;
  const core::Affine& o_;
  const A* weight_;
  const int64_t room_;
  Scratch scratch_;
  double *shift_, *scale_;
  A *shift_run_, *scale_run_;
  bool one_run_ = false;
};

template <class S>
void run(const core::Normalisation& n, const core::AffineResults& results, ParallelFor parallel) {
  using A = core::accumulation_t<S>;
  const core::Affine& o = n.affine;
  const int64_t run_length = core::maximum(1, core::ceil_div(o.batch, kUnits));
  const int64_t runs = core::ceil_div(o.batch, run_length);
  const int64_t items = NormSample<S>::items(o), least = o.after == 1 ? kRowsPerPiece : 1;
  const int64_t wanted = core::maximum(1, core::minimum(kUnits / core::maximum(1, runs), items / least));
  const core::Split cut = core::even_split(items, core::ceil_div(items, wanted), 1);
  const int64_t pieces = core::maximum(1, cut.count);

  const int64_t room = core::round_up(o.channels, kGranule), units = runs * pieces;
  Scratch scratch(2 * Scratch::room<double>(units * room) + Scratch::room<A>(room));
  double* shift_sums = scratch.take<double>(units * room);  // (runs, pieces, room)
  double* scale_sums = scratch.take<double>(units * room);
  const A* weight = static_cast<const A*>(n.weight);
  if (weight == nullptr) {
    A* ones = scratch.take<A>(room);
    for (int64_t c = 0; c < room; ++c) ones[c] = A(1);
    weight = ones;
  }
  A *shift_sqnorm = static_cast<A*>(results.shift_sqnorm), *scale_sqnorm = static_cast<A*>(results.scale_sqnorm);
  auto body = [&](int64_t begin, int64_t end) {
    NormSample<S> sample(n, weight, room);
    for (int64_t unit = begin; unit < end; ++unit) {
      double *shift = shift_sums + unit * room, *scale = scale_sums + unit * room;
      for (int64_t c = 0; c < room; ++c) shift[c] = scale[c] = 0.0;
      const int64_t this_run = unit / pieces, piece = unit % pieces;
      for (int64_t i = this_run * run_length; i < core::minimum((this_run + 1) * run_length, o.batch); ++i) {
        sample.run(i, cut.begin(piece), cut.end(piece));
        const double shift_square = sample.square_and_add_shift(shift),
                     scale_square = sample.square_and_add_scale(scale);
        if (pieces > 1) continue;
        shift_sqnorm[i] = static_cast<A>(shift_square);
        scale_sqnorm[i] = static_cast<A>(scale_square);
      }
    }
  };
  const double elements = static_cast<double>(o.batch * o.before) * static_cast<double>(o.channels * o.after);
  parallel(units, 16.0 * elements, body);

  const auto finish = [&](double* sums, A* sqnorm, void* total) {
    for (int64_t i = 0; pieces > 1 && i < o.batch; ++i) {
      double* of_sample = sums + i * pieces * room;
      for (int64_t piece = 1; piece < pieces; ++piece) {
        for (int64_t c = 0; c < room; ++c) of_sample[c] += of_sample[piece * room + c];
      }
      sqnorm[i] = static_cast<A>(square_and_add(of_sample, room, nullptr));
    }
    for (int64_t c = 0; c < o.channels; ++c) {
      static_cast<A*>(total)[c] = static_cast<A>(core::pairwise_sum(sums + c, runs, pieces * room));
    }
  };
  finish(shift_sums, shift_sqnorm, results.shift);
  finish(scale_sums, scale_sqnorm, results.scale);
}

}  // namespace

void norm_affine(const core::Normalisation& normalisation, const core::AffineResults& results, ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(normalisation.affine.dtype, run, normalisation, results, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
