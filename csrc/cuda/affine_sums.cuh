// Sums over positions that gradients of a scale and a shift are made of, and the gradient of x that a normalisation has
// along with them: shared by affine_sqnorm and norm_affine.
//
// Channels adjacent in memory (rows): a team of threads owns a tile of channels, each thread those of kPer vectors of
// 16 bytes, whose sums stay in its registers while it walks positions. Copies to shared memory run kStages - 1
// positions ahead (cp.async); a thread reads only what it copied itself, so that they need no barrier. The teams of a
// block either take turns at the positions of a piece of one sample, or, of short samples, own a sample each, for a run
// of samples: then a team squares a sample's sums itself, and adds them to totals in shared memory. Either way the
// block's teams are added in order, and one row (scale, shift) of sums per block goes to the workspace.
//
// Positions adjacent (pixels): a team of threads owns one channel of one sample at a time, and all of its sums end as
// one number.
//
// Sums over at most kDepth = 64 positions are in the accumulation type; threads, teams and what follows are added in
// float64, the rows of the workspace are rounded to the accumulation type. The second step, finish_kernel, adds them in
// order: to a sample's gradients, which it squares, and to those of all samples. No atomics, and the cut depends on
// shapes, and addresses modulo 16, alone: the same inputs give the same bits.
#pragma once

#include "core/operands.h"
#include "cuda/vector.cuh"

namespace ghostgrad::cuda {
namespace {

constexpr int kDepth = 64;
// What an H100 runs at once if a thread has 64 registers: half of what its 132 multiprocessors can hold.
constexpr int64_t kResident = 132 * 1024;

enum Form {
  kShift,      // sums of b
  kScale,      // and of b x^, with x^ = (x - mean) rstd
  kGradient,   // and the gradient of x, whose two means over channels are known
  kNormalise,  // and the gradient of x, whose two means are those of the row that a team owns
};

// Results of the first step.
template <class A>
struct Sums {
  A *shift, *scale;                // (units, d), or null if only norms are wanted
  A *shift_sqnorm, *scale_sqnorm;  // (B, tiles), of teams that own samples
};

// gradient of x = rstd (w b - p - x^ q), with p and q the means of w b and of w b x^ over what is normalised together.
template <class A>
struct Means {
  const A *p, *q;  // (B, T, G)
};
template <class A>
__device__ __forceinline__ A input_gradient(A b, A normalised, A weight, A rstd, A p, A q) {
  return rstd * (weight * b - p - normalised * q);
}

template <class A>
__device__ __forceinline__ A statistic(const void* values, int64_t at, A otherwise) {
  return values != nullptr ? static_cast<const A*>(values)[at] : otherwise;
}

// --- rows ---

struct RowPlan {
  int lanes, teams;  // threads of a team, teams of a block
  bool own;          // teams own samples
  int tiles;         // of channels, as many as a team holds
  int pieces;        // of a sample
  int length;        // samples of a run if `own`, else positions of a piece
  int units;         // runs or pieces, each with a row in the workspace
  int group;         // channels of a group
  double share;      // 1 / channels
  float share_float;
  int shared_bytes;

  Launch launch() const { return Launch{tiles * units, lanes * teams, shared_bytes}; }
};

// The cut for teams of `lanes` threads with kPer vectors each. Its sizes fit 32 bits with room to spare: a block has
// kilobytes to read, or there are few samples.
template <class S, int kPer, int kStages, bool kMayOwn = true>
RowPlan row_plan(const core::Affine& o, int lanes, int block) {
  constexpr int kOwned = kPer * kVector<S>;
  RowPlan plan{};
  plan.lanes = lanes;
  plan.teams = static_cast<int>(core::maximum(1, block / lanes));
  plan.group = static_cast<int>(core::maximum(1, o.channels / o.groups));
  plan.share = 1.0 / static_cast<double>(core::maximum(1, o.channels));
  plan.share_float = static_cast<float>(plan.share);
  const int threads = plan.lanes * plan.teams;
  const int staged = kStages * (o.scaled ? 2 : 1) * kPer * 16 * threads;
  const int totals = (2 * kOwned + 1) * static_cast<int>(sizeof(core::accumulation_t<S>)) * threads;
  const int64_t tiles = core::ceil_div(o.channels, int64_t{lanes} * kOwned), tasks = o.batch * tiles;
  const int64_t jobs = kResident / threads;
  plan.tiles = static_cast<int>(tiles);
  plan.own = kMayOwn && o.before <= kDepth && (o.before <= 4 || tasks >= jobs * plan.teams);
  if (plan.own) {
    const int64_t most = core::maximum(1, kDepth / core::maximum(1, o.before));
    const int64_t rounds = core::maximum(1, core::minimum(most, tasks / (4 * jobs * plan.teams)));
    plan.pieces = 1;
    plan.length = static_cast<int>(rounds) * plan.teams;
    plan.units = static_cast<int>(core::ceil_div(o.batch, plan.length));
  } else {
    const int64_t wanted = core::ceil_div(tasks * o.before, jobs), most = int64_t{kDepth} * plan.teams;
    const core::Split cut =
        core::even_split(o.before, core::minimum(most, core::maximum(wanted, plan.teams)), plan.teams);
    plan.pieces = static_cast<int>(cut.count);
    plan.length = static_cast<int>(cut.size);
    plan.units = static_cast<int>(o.batch * cut.count);
  }
  plan.shared_bytes = staged + (plan.own || plan.teams > 1 ? totals : 0);
  return plan;
}

enum Own { kPieces, kSamples, kAsPlanned };  // what teams own

// kAligned: rows are read as vectors, and a thread's channels are those of kPer vectors; else the thread owns as many
// channels, `lanes` apart, and reads elements. kOwn is plan.own, or kAsPlanned where registers are not short.
template <class S, int kPer, bool kAligned, int kStages, int kForm, bool kOneGroup, int kOwn = kAsPlanned>
__device__ __forceinline__ void sum_rows(const core::Normalisation& n, const RowPlan& plan,
                                         const Means<core::accumulation_t<S>>& means,
                                         const Sums<core::accumulation_t<S>>& out) {
  using A = core::accumulation_t<S>;
  using Vector = Pack<S, kVector<S>>;
  constexpr bool kScaled = kForm != kShift, kWrites = kForm == kGradient || kForm == kNormalise;
  constexpr int kOwned = kPer * kVector<S>, kOperands = kScaled ? 2 : 1;
  constexpr int kSlots = 2 * kOwned + 1;  // odd, so that the threads of a warp meet different banks
  const core::Affine& o = n.affine;
  const int thread = static_cast<int>(threadIdx.x), threads = plan.lanes * plan.teams;
  const int lane = thread % plan.lanes, team = thread / plan.lanes;
  Vector* staged = reinterpret_cast<Vector*>(dynamic_shared()) + thread;  // (kStages, kOperands, kPer, threads)
  A* totals = reinterpret_cast<A*>(dynamic_shared() + int64_t{kStages} * kOperands * kPer * 16 * threads);
  A* slot = totals + thread * kSlots;  // (threads, kSlots)
  __shared__ A exchange[kForm == kNormalise ? 2 * 32 * 2 : 1];
  __shared__ double exchange_squares[kForm == kNormalise ? 2 * 32 * 2 : 1];
  const bool own = kOwn == kAsPlanned ? plan.own : kOwn == kSamples;
  const bool keep_totals = own && out.shift != nullptr;
  const int apart = kAligned ? plan.lanes * kVector<S> : plan.lanes;  // of a thread's vectors, or of its channels

#pragma unroll 1
  for (int job = static_cast<int>(blockIdx.x); job < plan.tiles * plan.units; job += static_cast<int>(gridDim.x)) {
    const int unit = job / plan.tiles, tile = job - unit * plan.tiles;
    if constexpr (kForm == kNormalise) __syncthreads();  // the exchanges begin anew
    const int channel = tile * plan.lanes * kOwned + lane * (kAligned ? kVector<S> : 1);
    const int behind = static_cast<int>(o.channels) - channel, team_owns = plan.lanes * kOwned;
    const int owned =
        behind <= 0 ? 0 : ((behind < team_owns ? behind : team_owns) + apart - 1) / apart * (kAligned ? kVector<S> : 1);
    const auto offset = [&](int k) {  // of the k-th owned channel from the first
      return kAligned ? k / kVector<S> * apart + k % kVector<S> : k * apart;
    };

    // The team's way: positions `first`, first + step, ... of samples `sample`, sample + teams, ...
    const int batch = static_cast<int>(o.batch), sample = own ? unit * plan.length + team : unit / plan.pieces;
    const int64_t piece = own ? 0 : int64_t{unit % plan.pieces} * plan.length;
    const int64_t end = own ? o.before : core::minimum(o.before, piece + plan.length);
    const int64_t first = own ? 0 : piece + team;
    const int step = own ? 1 : plan.teams;
    const int period = own ? static_cast<int>(core::maximum(1, o.before)) : INT32_MAX;
    const int rounds = own ? plan.length / plan.teams : 1;
    const int steps = own ? rounds * period : (static_cast<int>(end - piece) + step - 1) / step;  // of all teams
    int mine = 0;                                                                                 // of this one
    if (!own) {
      mine = first < end ? (static_cast<int>(end - first) + step - 1) / step : 0;
    } else if (sample < batch) {
      const int samples = (batch - sample + plan.teams - 1) / plan.teams;
      mine = (rounds < samples ? rounds : samples) * static_cast<int>(o.before);
    }
    // Where that begins in a tensor, and how far it is to the next position, of the next sample if this is its `last`.
    const auto start = [&](int64_t batch_stride, int64_t before_stride) {
      return sample * batch_stride + first * before_stride;
    };
    const auto stride = [&](bool last, int64_t batch_stride, int64_t before_stride) {
      return last ? plan.teams * batch_stride - (period - 1) * before_stride : step * before_stride;
    };

    const S *b = static_cast<const S*>(o.b) + start(o.b_batch_stride, o.b_before_stride) + channel, *x = nullptr;
    if constexpr (kScaled) x = static_cast<const S*>(o.x) + start(o.x_batch_stride, o.x_before_stride) + channel;
    int next_i = 0;
    const auto fetch = [&](int j) {  // the copies of step j, in order
      if (j < mine) {
#pragma unroll
        for (int operand = 0; operand < kOperands; ++operand) {
          const S* row = operand == 0 ? b : x;
#pragma unroll
          for (int v = 0; v < kPer; ++v) {
            Vector* to = staged + ((j % kStages * kOperands + operand) * kPer + v) * threads;
            if constexpr (kAligned) {
              const bool inside = v * kVector<S> < owned;
              copy_async<16>(to, inside ? row + v * apart : row, inside ? 16 : 0);
            } else {
              Vector read{};
#pragma unroll
              for (int e = 0; e < kVector<S>; ++e) {
                const int k = v * kVector<S> + e;
                if (k < owned) read.element[e] = row[k * apart];
              }
              *to = read;
            }
          }
        }
        const bool last = own && ++next_i == period;
        if (last) next_i = 0;
        b += stride(last, o.b_batch_stride, o.b_before_stride);
        if constexpr (kScaled) x += stride(last, o.x_batch_stride, o.x_before_stride);
      }
      commit_copies();
    };
#pragma unroll
    for (int j = 0; j < kStages; ++j) fetch(j);

    A shift[kOwned], scale[kScaled ? kOwned : 1];
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
      shift[k] = A(0);
      if constexpr (kScaled) scale[k] = A(0);
    }
    // Weights come from the first-level cache, which the copies above pass by, whenever they are needed.
    const auto weights_of = [&](int v) {
      Pack<A, kVector<S>> weights;
#pragma unroll
      for (int e = 0; e < kVector<S>; ++e) weights.element[e] = A(1);
      if (n.weight == nullptr) return weights;
      const A* from = static_cast<const A*>(n.weight) + channel;
      if constexpr (kAligned) {
        if (v * kVector<S> < owned) weights = load<kVector<S>>(from + v * apart);
      } else {
#pragma unroll
        for (int e = 0; e < kVector<S>; ++e) {
          if (v * kVector<S> + e < owned) weights.element[e] = from[offset(v * kVector<S> + e)];
        }
      }
      return weights;
    };
    if (keep_totals) {
#pragma unroll
      for (int k = 0; k < 2 * kOwned; ++k) slot[k] = A(0);
    }

    // Statistics of one group are fetched one step ahead, unless rows are so long that it makes no difference; of
    // several, when they change.
    constexpr bool kAhead = kStages > 2;
    int64_t mean_at = start(o.mean_batch_stride, o.mean_before_stride);
    int64_t rstd_at = start(o.rstd_batch_stride, o.rstd_before_stride);
    A ahead_mean = A(0), ahead_rstd = A(1);
    const auto fetch_statistics = [&](bool last) {
      ahead_mean = statistic(o.mean, mean_at, A(0));
      ahead_rstd = statistic(o.rstd, rstd_at, A(1));
      mean_at += stride(last, o.mean_batch_stride, o.mean_before_stride);
      rstd_at += stride(last, o.rstd_batch_stride, o.rstd_before_stride);
    };
    if constexpr (kScaled && kOneGroup && kAhead) {
      if (mine > 0) fetch_statistics(own && period == 1);
    }
    A mean[kOneGroup ? 1 : kOwned] = {}, rstd[kOneGroup ? 1 : kOwned] = {};
    int64_t gradient_at = start(n.batch_stride, n.before_stride);
    int64_t means_at = start(o.before * o.groups, o.groups);
    int i = 0, round = 0;  // positions of this sample, samples that were passed

#pragma unroll 1
    for (int j = 0; j < steps; ++j) {
      const bool inside = j < mine, last = own && i + 1 == period;
      if constexpr (kScaled && kOneGroup) {
        if (!kAhead && inside) fetch_statistics(last);
        mean[0] = ahead_mean;
        rstd[0] = ahead_rstd;
        if (kAhead && j + 1 < mine) fetch_statistics(own && (period == 1 || i + 2 == period));
      } else if constexpr (kScaled) {
        if (inside && (i == 0 || o.mean_before_stride != 0 || o.rstd_before_stride != 0)) {
#pragma unroll
          for (int k = 0; k < kOwned; ++k) {
            const int group = k < owned ? (channel + offset(k)) / plan.group : 0;
            mean[k] = statistic(o.mean, mean_at + group * o.mean_group_stride, A(0));
            rstd[k] = statistic(o.rstd, rstd_at + group * o.rstd_group_stride, A(1));
          }
        }
        mean_at += stride(last, o.mean_batch_stride, o.mean_before_stride);
        rstd_at += stride(last, o.rstd_batch_stride, o.rstd_before_stride);
      }
      wait_for_copies<kStages - 1>();
      const Vector* here = staged + j % kStages * kOperands * kPer * threads;
      A row[2] = {A(0), A(0)};  // sums of w b and of w b x^, then their means
      if (inside) {
#pragma unroll
        for (int v = 0; v < kPer; ++v) {
          const Vector of_b = here[v * threads];
          Vector of_x{};
          if constexpr (kScaled) of_x = here[(kPer + v) * threads];
          Pack<A, kVector<S>> weights;
          if constexpr (kForm == kNormalise) weights = weights_of(v);
#pragma unroll
          for (int e = 0; e < kVector<S>; ++e) {
            const int k = v * kVector<S> + e;
            if (k >= owned) continue;
            const A gradient = core::to_accumulation(of_b.element[e]);
            shift[k] += gradient;
            if constexpr (kScaled) {
              const int s = kOneGroup ? 0 : k;
              const A product = (core::to_accumulation(of_x.element[e]) - mean[s]) * rstd[s] * gradient;
              scale[k] += product;
              if constexpr (kForm == kNormalise) {
                row[0] += weights.element[e] * gradient;
                row[1] += weights.element[e] * product;
              }
            }
          }
        }
      }
      if constexpr (kForm == kNormalise) {
        team_sums(row, plan.lanes, exchange, j % 2);
        row[0] *= sizeof(A) == 8 ? static_cast<A>(plan.share) : static_cast<A>(plan.share_float);
        row[1] *= sizeof(A) == 8 ? static_cast<A>(plan.share) : static_cast<A>(plan.share_float);
      }
      if constexpr (kWrites) {
        if (inside) {
          S* gradient = static_cast<S*>(n.gradient) + gradient_at + channel;
          if constexpr (kForm == kGradient && kOneGroup) {
            row[0] = means.p[means_at];
            row[1] = means.q[means_at];
          }
#pragma unroll
          for (int v = 0; v < kPer; ++v) {
            Vector of_b = here[v * threads], of_x = here[(kPer + v) * threads];
            const Pack<A, kVector<S>> weights = weights_of(v);
            forget(of_b);  // or what was unpacked above would stay in registers
            forget(of_x);
            Vector result{};
#pragma unroll
            for (int e = 0; e < kVector<S>; ++e) {
              const int k = v * kVector<S> + e, s = kOneGroup ? 0 : k;
              A p = row[0], q = row[1];
              if constexpr (!kOneGroup) {
                const int64_t at = means_at + (k < owned ? (channel + offset(k)) / plan.group : 0);
                p = means.p[at];
                q = means.q[at];
              }
              const A normalised = (core::to_accumulation(of_x.element[e]) - mean[s]) * rstd[s];
              result.element[e] = core::from_accumulation<S>(input_gradient(
                  core::to_accumulation(of_b.element[e]), normalised, weights.element[e], rstd[s], p, q));
              if (!kAligned && k < owned) gradient[offset(k)] = result.element[e];
            }
            if (kAligned && v * kVector<S> < owned) store(gradient + v * apart, result);
          }
        }
        gradient_at += stride(last, n.batch_stride, n.before_stride);
        means_at += stride(last, o.before * o.groups, o.groups);
      }
      fetch(j + kStages);

      ++i;
      if (own && last) {  // a team's sample is finished
        A squares[2] = {A(0), A(0)};
#pragma unroll
        for (int k = 0; k < kOwned; ++k) {
          squares[0] += shift[k] * shift[k];
          if (keep_totals) slot[k] += shift[k];
          shift[k] = A(0);
          if constexpr (kScaled) {
            squares[1] += scale[k] * scale[k];
            if (keep_totals) slot[kOwned + k] += scale[k];
            scale[k] = A(0);
          }
        }
        double norms[2] = {static_cast<double>(squares[0]), static_cast<double>(squares[1])};
        team_sums(norms, plan.lanes, exchange_squares, round % 2);
        const int finished = sample + round * plan.teams;
        if (lane == 0 && finished < batch) {
          out.shift_sqnorm[int64_t{finished} * plan.tiles + tile] = static_cast<A>(norms[0]);
          if constexpr (kScaled) out.scale_sqnorm[int64_t{finished} * plan.tiles + tile] = static_cast<A>(norms[1]);
        }
        ++round;
        i = 0;
      }
    }
    wait_for_copies<0>();

    const int64_t sums_at = int64_t{unit} * o.channels + channel;
    if (own && !keep_totals) continue;
    if (!own && plan.teams == 1) {  // nobody to add to
#pragma unroll
      for (int k = 0; k < kOwned; ++k) {
        if (k >= owned) continue;
        out.shift[sums_at + offset(k)] = shift[k];
        if constexpr (kScaled) out.scale[sums_at + offset(k)] = scale[k];
      }
      continue;
    }
    if (!own) {
#pragma unroll
      for (int k = 0; k < kOwned; ++k) {
        slot[k] = shift[k];
        if constexpr (kScaled) slot[kOwned + k] = scale[k];
      }
    }
    __syncthreads();
    for (int k = team; k < owned; k += plan.teams) {  // each team adds some of the channels of all
      double sums[2] = {0.0, 0.0};
      for (int other = 0; other < plan.teams; ++other) {
        const A* theirs = totals + (other * plan.lanes + lane) * kSlots;
        sums[0] += static_cast<double>(theirs[k]);
        if constexpr (kScaled) sums[1] += static_cast<double>(theirs[kOwned + k]);
      }
      out.shift[sums_at + offset(k)] = static_cast<A>(sums[0]);
      if constexpr (kScaled) out.scale[sums_at + offset(k)] = static_cast<A>(sums[1]);
    }
    __syncthreads();  // nobody starts new totals before these were read
  }
}

// Whether all rows of b, x and the gradient, and the weights, begin at 16 bytes and can be read in whole vectors.
inline bool rows_aligned(const core::Normalisation& n, int64_t element_bytes) {
  const core::Affine& o = n.affine;
  const int64_t strides = o.b_batch_stride | o.b_before_stride | o.channels |
                          (o.scaled ? o.x_batch_stride | o.x_before_stride : 0) |
                          (n.gradient != nullptr ? n.batch_stride | n.before_stride : 0);
  const int64_t addresses = address(o.b) | (o.scaled ? address(o.x) : 0) | address(n.gradient) | address(n.weight);
  return strides * element_bytes % 16 == 0 && addresses % 16 == 0;
}

// --- pixels ---

struct PixelPlan {
  int lanes;       // threads of a team, a power of two up to kThreads
  int64_t pieces;  // of the positions after the channels
  int64_t length;  // of a piece

  GHOSTGRAD_HD int64_t units(const core::Affine& o) const {
    return o.batch * o.before * pieces;
  }  // rows of the workspace's sums
  Launch launch(const core::Affine& o) const {
    return Launch{grid_for(core::ceil_div(units(o) * o.channels, kThreads / lanes)), kThreads};
  }
};

template <class S>
PixelPlan pixel_plan(const core::Affine& o) {
  constexpr int64_t kPiece = 8 * kThreads * kVector<S>;
  const core::Split cut = core::even_split(o.after, kPiece, kVector<S>);
  const int64_t vectors = core::ceil_div(cut.size, kVector<S>);
  const int least = power_of_two(vectors, 8);  // not so few that neighbours read far from each other
  return PixelPlan{static_cast<int>(core::maximum(least, power_of_two(core::ceil_div(vectors, 4), kThreads))),
                   cut.count, cut.size};
}

// One channel's piece of positions: what team `index` of all owns.
struct Pixels {
  int64_t sample, before, channel, first, length;
};
__device__ __forceinline__ Pixels pixels_at(const core::Affine& o, const PixelPlan& plan, int64_t index) {
  const int64_t unit = quotient(index, o.channels), image = quotient(unit, plan.pieces);
  const int64_t sample = quotient(image, o.before), first = (unit - image * plan.pieces) * plan.length;
  return Pixels{sample, image - sample * o.before, index - unit * o.channels, first,
                core::minimum(plan.length, o.after - first)};
}

// Adds a thread's share of `length` adjacent positions to sums of b and of b x^. If kKept, it leaves its vectors, as
// they were read, in shared memory.
template <class S, bool kScaled, bool kKept = false>
__device__ __forceinline__ void sum_pixels(const S* b, const S* x, int64_t length, const Span& span,
                                           core::accumulation_t<S> mean, core::accumulation_t<S> rstd, int thread,
                                           int threads, double (&sums)[2], Pack<S, kVector<S>>* kept_b = nullptr,
                                           Pack<S, kVector<S>>* kept_x = nullptr) {
  using A = core::accumulation_t<S>;
  constexpr int kAtOnce = 4;
  A shift = A(0), scale = A(0);
  const auto add = [&](S of_b, S of_x) {
    const A gradient = core::to_accumulation(of_b);
    shift += gradient;
    if constexpr (kScaled) scale += (core::to_accumulation(of_x) - mean) * rstd * gradient;
  };
#pragma unroll 4
  for (int64_t j = thread; j < span.head; j += threads) add(b[j], x[j]);
  for (int64_t j = span.tail + thread; j < length; j += threads) add(b[j], x[j]);
  const auto move_on = [&] {
    sums[0] += static_cast<double>(shift);
    sums[1] += static_cast<double>(scale);
    shift = scale = A(0);
  };
  move_on();
  const int vectors = static_cast<int>(span.vectors);
  b += span.head;
  x += span.head;
  for (int v = thread; v < vectors; v += kAtOnce * threads) {
    Pack<S, kVector<S>> bs[kAtOnce], xs[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int at = v + u * threads;
      if (at >= vectors) continue;
      bs[u] = load<kVector<S>>(b + at * kVector<S>);
      if constexpr (kScaled) xs[u] = load<kVector<S>>(x + at * kVector<S>);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int at = v + u * threads;
      if (at >= vectors) continue;
#pragma unroll
      for (int e = 0; e < kVector<S>; ++e) add(bs[u].element[e], (kScaled ? xs : bs)[u].element[e]);
      if constexpr (kKept) {
        kept_b[at] = bs[u];
        kept_x[at] = xs[u];
      }
    }
    move_on();
  }
}

template <class S, bool kScaled>
__global__ void __launch_bounds__(kThreads, 1)
    pixel_sums_kernel(const core::Affine o, const PixelPlan plan, const Sums<core::accumulation_t<S>> out) {
  using A = core::accumulation_t<S>;
  __shared__ double exchange[2 * 32 * 2];
  int turn = 0;
  const int lane = static_cast<int>(threadIdx.x) % plan.lanes, team = static_cast<int>(threadIdx.x) / plan.lanes;
  const int64_t teams = kThreads / plan.lanes, count = plan.units(o) * o.channels;
  for (int64_t first = blockIdx.x * teams; first < count; first += gridDim.x * teams) {
    const int64_t index = first + team;
    double sums[2] = {0.0, 0.0};
    if (index < count) {
      const Pixels own = pixels_at(o, plan, index);
      const S* b = static_cast<const S*>(o.b) + own.sample * o.b_batch_stride + own.before * o.b_before_stride +
                   own.channel * o.b_channel_stride + own.first;
      const S* x = b;
      A mean = A(0), rstd = A(1);
      if constexpr (kScaled) {
        const int64_t group = quotient(own.channel * o.groups, o.channels);
        x = static_cast<const S*>(o.x) + own.sample * o.x_batch_stride + own.before * o.x_before_stride +
            own.channel * o.x_channel_stride + own.first;
        mean = statistic(
            o.mean, own.sample * o.mean_batch_stride + own.before * o.mean_before_stride + group * o.mean_group_stride,
            A(0));
        rstd = statistic(
            o.rstd, own.sample * o.rstd_batch_stride + own.before * o.rstd_before_stride + group * o.rstd_group_stride,
            A(1));
      }
      sum_pixels<S, kScaled>(b, x, own.length, span_of(own.length, b, x, x), mean, rstd, lane, plan.lanes, sums);
    }
    team_sums(sums, plan.lanes, exchange, turn ^= 1);
    if (lane == 0 && index < count) {
      out.shift[index] = static_cast<A>(sums[0]);
      if constexpr (kScaled) out.scale[index] = static_cast<A>(sums[1]);
    }
  }
}

// --- the second step ---

struct FinishPlan {
  int64_t units, channels, batch;
  bool own;  // whether teams owned samples, and left norms of tiles; else units = batch * pieces
  int64_t pieces, tiles;
  int kinds;  // 1 without a scale
  int64_t total_blocks, norm_blocks;
};
constexpr int kFinishThreads = 1024, kColumns = 32;

// A block owns kColumns = 32 channels and adds all rows of the workspace, 32 at a time; or it owns one sample and adds
// its pieces, a thread one channel at a time, and squares; or it owns 1024 samples and adds their tiles' norms.
template <class A>
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish_kernel(const FinishPlan plan, const Sums<A> in, A* __restrict__ shift, A* __restrict__ scale,  // (d,)
                  A* __restrict__ shift_sqnorm, A* __restrict__ scale_sqnorm) {                           // (B,)
  __shared__ double exchange[2 * 32], columns[32][kColumns];
  int turn = 0;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t job = blockIdx.x; job < plan.kinds * (plan.total_blocks + plan.norm_blocks); job += gridDim.x) {
    const int64_t which = plan.kinds == 2 ? job / 2 : job;
    const bool of_shift = plan.kinds == 1 || job % 2 == 0;
    const A* sums = of_shift ? in.shift : in.scale;
    if (which < plan.total_blocks) {
      constexpr int kRowsAtOnce = kFinishThreads / kColumns;
      const int64_t channel = which * kColumns + thread % kColumns;
      double sum = 0.0;
      if (channel < plan.channels) {
#pragma unroll 4
        for (int64_t unit = thread / kColumns; unit < plan.units; unit += kRowsAtOnce) {
          sum += static_cast<double>(sums[unit * plan.channels + channel]);
        }
      }
      columns[thread / 32][thread % 32] = sum;
      __syncthreads();
      if (thread < kColumns && channel < plan.channels) {
        double total = 0.0;
        for (int warp = 0; warp < kFinishThreads / 32; ++warp) total += columns[warp][thread];
        (of_shift ? shift : scale)[channel] = static_cast<A>(total);
      }
      __syncthreads();  // nobody overwrites the columns before they were read
    } else if (!plan.own) {
      const int64_t sample = which - plan.total_blocks;
      double squares[1] = {0.0};
      for (int64_t channel = thread; channel < plan.channels; channel += kFinishThreads) {
        const A* piece = sums + sample * plan.pieces * plan.channels + channel;
        double sum = 0.0;
#pragma unroll 8
        for (int64_t k = 0; k < plan.pieces; ++k) sum += static_cast<double>(piece[k * plan.channels]);
        squares[0] += sum * sum;
      }
      team_sums(squares, kFinishThreads, exchange, turn ^= 1);
      if (thread == 0) (of_shift ? shift_sqnorm : scale_sqnorm)[sample] = static_cast<A>(squares[0]);
    } else {
      const int64_t sample = (which - plan.total_blocks) * kFinishThreads + thread;
      if (sample >= plan.batch) continue;
      const A* norms = (of_shift ? in.shift_sqnorm : in.scale_sqnorm) + sample * plan.tiles;
      double sum = 0.0;
      for (int64_t tile = 0; tile < plan.tiles; ++tile) sum += static_cast<double>(norms[tile]);
      (of_shift ? shift_sqnorm : scale_sqnorm)[sample] = static_cast<A>(sum);
    }
  }
}

// Bytes of what the first step leaves: rows of sums, and norms of tiles where teams own samples.
template <class A>
int64_t sums_bytes(const core::Affine& o, int64_t units, int64_t tiles) {
  return 2 * (units * o.channels + o.batch * tiles) * static_cast<int64_t>(sizeof(A));
}
// Where it leaves them. Norms of a single tile are results already.
template <class A>
Sums<A> sums_in(void* workspace, const core::Affine& o, int64_t units, int64_t tiles, const core::AffineResults& r) {
  A* at = static_cast<A*>(workspace);
  Sums<A> sums{at, at + units * o.channels, at + 2 * units * o.channels, at + 2 * units * o.channels + o.batch * tiles};
  if (tiles == 1) {
    sums.shift_sqnorm = static_cast<A*>(r.shift_sqnorm);
    sums.scale_sqnorm = static_cast<A*>(r.scale_sqnorm);
  }
  return sums;
}

template <class A>
cudaError_t finish(const core::Affine& o, const Sums<A>& sums, int64_t units, bool own, int64_t pieces, int64_t tiles,
                   const core::AffineResults& r, cudaStream_t stream) {
  FinishPlan plan{units, o.channels, o.batch, own, pieces, tiles, o.scaled ? 2 : 1, 0, 0};
  if (r.shift != nullptr) plan.total_blocks = core::ceil_div(o.channels, kColumns);
  plan.norm_blocks = !own ? o.batch : tiles != 1 ? core::ceil_div(o.batch, kFinishThreads) : 0;
  const int64_t blocks = plan.kinds * (plan.total_blocks + plan.norm_blocks);
  if (blocks == 0) return cudaSuccess;
  return launch(finish_kernel<A>, Launch{grid_for(blocks), kFinishThreads}, stream, plan, sums,
                static_cast<A*>(r.shift), static_cast<A*>(r.scale), static_cast<A*>(r.shift_sqnorm),
                static_cast<A*>(r.scale_sqnorm));
}

}  // namespace
}  // namespace ghostgrad::cuda
