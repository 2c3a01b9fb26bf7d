// norm_affine on CUDA: the backward of a layer that normalises, scales and shifts, in one go,
//
//   x^ = (x - mean) rstd,  p = mean over the group of w b,  q = mean over the group of w b x^
//   gradient of x = rstd (w b - p - x^ q),  of the scale = sum b x^,  of the shift = sum b
//
// bound by reading b and x and writing the gradient once each. The sums for scale and shift, and the second step that
// makes norms of them, are those of affine_sums.cuh.
//
// Layer norm, channels adjacent: a team of threads, a part of a warp or whole warps, owns whole rows. Each thread
// copies its vectors of b and x to shared memory some rows ahead (cp.async), so that three rows are on their way while
// one is worked on, whatever registers allow. It reads them there twice: for the channels' sums and its part of p and
// q, which pass through shared memory with one barrier per row, and for the gradient. Rows of up to 512 vectors of 16
// bytes have one per thread; up to 1024, and 2048 of float32, blocks of 1024 threads keep one row on its way.
//
// Group and instance norm, positions adjacent: a block owns one group of one sample. Each thread leaves the vectors of
// b and x that it read in shared memory, up to kKept = 96 KiB, so that only the channels' sums, p and q cross threads,
// and reads them back for the gradient.
//
// Longer rows, larger groups, and several groups of adjacent channels are read twice: once for p and q (pixels: for the
// channels' sums that make them), then for the gradient.
#include "core/storage.h"
#include "cuda/affine_sums.cuh"
#include "cuda/norm_affine.h"

namespace ghostgrad::cuda {
namespace {

constexpr int64_t kKept = 96 * 1024;

// --- rows ---

// Blocks of a layer norm: of one row with as many vectors as threads, and of long rows.
constexpr int kBlock = 512, kLongBlock = 1024;
constexpr int kStages = 4, kLongStages = 2;
template <class S>
constexpr int kLongVectors = sizeof(S) == 4 ? 2 : 1;  // of a thread: no more sums than registers can hold

template <class S, bool kAligned, int kOwn>
__global__ void __launch_bounds__(kBlock, (kAligned && kOwn == kPieces) ? 2 : 1)
    norm_affine_kernel(const core::Normalisation n, const RowPlan plan, const Sums<core::accumulation_t<S>> out) {
  sum_rows<S, 1, kAligned, kStages, kNormalise, true, kOwn>(n, plan, {}, out);
}
template <class S>
__global__ void __launch_bounds__(kLongBlock)
    norm_affine_long_kernel(const core::Normalisation n, const RowPlan plan, const Sums<core::accumulation_t<S>> out) {
  sum_rows<S, kLongVectors<S>, true, kLongStages, kNormalise, true, kPieces>(n, plan, {}, out);
}

template <class S, bool kAligned, bool kOneGroup>
__global__ void __launch_bounds__(kThreads, 1)
    row_gradient_kernel(const core::Normalisation n, const RowPlan plan, const Means<core::accumulation_t<S>> means,
                        const Sums<core::accumulation_t<S>> out) {
  sum_rows<S, 1, kAligned, kStages, kGradient, kOneGroup>(n, plan, means, out);
}

// p and q of one position's group of channels: a warp or the whole block at a time.
template <class S, int kCount>
__global__ void __launch_bounds__(kThreads, 1) row_means_kernel(const core::Normalisation n, int lanes,
                                                                core::accumulation_t<S>* __restrict__ p,    // (B, T, G)
                                                                core::accumulation_t<S>* __restrict__ q) {  // (B, T, G)
  using A = core::accumulation_t<S>;
  __shared__ double exchange[2 * 32 * 2];
  int turn = 0;
  const core::Affine& o = n.affine;
  const int lane = static_cast<int>(threadIdx.x) % lanes, team = static_cast<int>(threadIdx.x) / lanes;
  const int64_t teams = kThreads / lanes, count = o.batch * o.before * o.groups, width = o.channels / o.groups;
  for (int64_t first = blockIdx.x * teams; first < count; first += gridDim.x * teams) {
    const int64_t index = first + team;
    double sums[2] = {0.0, 0.0};
    if (index < count) {
      const int64_t position = quotient(index, o.groups), group = index - position * o.groups;
      const int64_t sample = quotient(position, o.before), t = position - sample * o.before, channel = group * width;
      const S* b = static_cast<const S*>(o.b) + sample * o.b_batch_stride + t * o.b_before_stride + channel;
      const S* x = static_cast<const S*>(o.x) + sample * o.x_batch_stride + t * o.x_before_stride + channel;
      const A mean = statistic(
          o.mean, sample * o.mean_batch_stride + t * o.mean_before_stride + group * o.mean_group_stride, A(0));
      const A rstd = statistic(
          o.rstd, sample * o.rstd_batch_stride + t * o.rstd_before_stride + group * o.rstd_group_stride, A(1));
#pragma unroll 2
      for (int64_t c = int64_t{lane} * kCount; c < width; c += int64_t{lanes} * kCount) {
        const auto bs = load<kCount>(b + c), xs = load<kCount>(x + c);
        Pack<A, kCount> weights;
#pragma unroll
        for (int e = 0; e < kCount; ++e) weights.element[e] = A(1);
        if (n.weight != nullptr) weights = load<kCount>(static_cast<const A*>(n.weight) + channel + c);
        A plain = A(0), scaled = A(0);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          const A product = weights.element[e] * core::to_accumulation(bs.element[e]);
          plain += product;
          scaled += product * ((core::to_accumulation(xs.element[e]) - mean) * rstd);
        }
        sums[0] += static_cast<double>(plain);
        sums[1] += static_cast<double>(scaled);
      }
    }
    team_sums(sums, lanes, exchange, turn ^= 1);
    if (lane == 0 && index < count) {
      p[index] = static_cast<A>(sums[0] / static_cast<double>(width));
      q[index] = static_cast<A>(sums[1] / static_cast<double>(width));
    }
  }
}

// --- pixels ---

// Writes a thread's share of the gradient of adjacent positions of one channel. If kKept, it finds its vectors where
// sum_pixels left them.
template <class S, bool kKept>
__device__ __forceinline__ void write_pixels(const S* b, const S* x, S* gradient, int64_t length, const Span& span,
                                             core::accumulation_t<S> weight, core::accumulation_t<S> mean,
                                             core::accumulation_t<S> rstd, core::accumulation_t<S> p,
                                             core::accumulation_t<S> q, int thread, int threads,
                                             const Pack<S, kVector<S>>* kept_b, const Pack<S, kVector<S>>* kept_x) {
  const auto at = [&](S of_b, S of_x) {
    return core::from_accumulation<S>(
        input_gradient(core::to_accumulation(of_b), (core::to_accumulation(of_x) - mean) * rstd, weight, rstd, p, q));
  };
  for (int64_t j = thread; j < span.head; j += threads) gradient[j] = at(b[j], x[j]);
  for (int64_t j = span.tail + thread; j < length; j += threads) gradient[j] = at(b[j], x[j]);
  const int vectors = static_cast<int>(span.vectors);
#pragma unroll 2
  for (int v = thread; v < vectors; v += threads) {
    const int64_t j = span.head + int64_t{v} * kVector<S>;
    const auto bs = kKept ? kept_b[v] : load<kVector<S>>(b + j), xs = kKept ? kept_x[v] : load<kVector<S>>(x + j);
    Pack<S, kVector<S>> result;
#pragma unroll
    for (int e = 0; e < kVector<S>; ++e) result.element[e] = at(bs.element[e], xs.element[e]);
    store(gradient + j, result);
  }
}

struct GroupPlan {
  int threads, lanes;  // of a block, of the team that owns one channel at a time
  int vectors;         // of a channel, at most
  int shared_bytes;    // 0: too large a group
};

template <class S>
GroupPlan group_plan(const core::Affine& o) {
  const int64_t width = o.channels / o.groups, vectors = o.after / kVector<S>;
  const int threads = width * vectors >= 2 * kThreads ? kThreads : 64;
  const int shared = threads / power_of_two(width, threads), of_few = power_of_two(vectors, 8);
  const int64_t bytes = 2 * width * (16 * vectors + static_cast<int64_t>(sizeof(double)));
  return GroupPlan{threads, shared > of_few ? shared : of_few, static_cast<int>(vectors),
                   bytes <= kKept ? static_cast<int>(bytes) : 0};
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    norm_affine_group_kernel(const core::Normalisation n, const GroupPlan plan,
                             const Sums<core::accumulation_t<S>> out) {  // (B * T, d)
  using A = core::accumulation_t<S>;
  __shared__ double exchange[2 * 32 * 2], exchange_means[2 * 32 * 2];
  int turn = 0, turn_means = 0;
  const core::Affine& o = n.affine;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % plan.lanes, team = thread / plan.lanes;
  const int teams = plan.threads / plan.lanes, width = static_cast<int>(o.channels / o.groups);
  const int kept = width * plan.vectors;
  Pack<S, kVector<S>>* kept_b = reinterpret_cast<Pack<S, kVector<S>>*>(dynamic_shared());  // (width, vectors)
  Pack<S, kVector<S>>* kept_x = kept_b + kept;
  double* sums = reinterpret_cast<double*>(kept_x + kept);  // (width, 2)
  const A* weight = static_cast<const A*>(n.weight);
  for (int64_t unit = blockIdx.x; unit < o.batch * o.before * o.groups; unit += gridDim.x) {
    const int64_t image = quotient(unit, o.groups), group = unit - image * o.groups;
    const int64_t sample = quotient(image, o.before), t = image - sample * o.before, channel = group * width;
    const S* b =
        static_cast<const S*>(o.b) + sample * o.b_batch_stride + t * o.b_before_stride + channel * o.b_channel_stride;
    const S* x =
        static_cast<const S*>(o.x) + sample * o.x_batch_stride + t * o.x_before_stride + channel * o.x_channel_stride;
    S* gradient = static_cast<S*>(n.gradient) + sample * n.batch_stride + t * n.before_stride + channel * o.after;
    const A mean =
        statistic(o.mean, sample * o.mean_batch_stride + t * o.mean_before_stride + group * o.mean_group_stride, A(0));
    const A rstd =
        statistic(o.rstd, sample * o.rstd_batch_stride + t * o.rstd_before_stride + group * o.rstd_group_stride, A(1));
    for (int first = 0; first < width; first += teams) {
      const int c = first + team;
      double own[2] = {0.0, 0.0};
      if (c < width) {
        const S *b_of = b + c * o.b_channel_stride, *x_of = x + c * o.x_channel_stride;
        sum_pixels<S, true, true>(b_of, x_of, o.after, span_of(o.after, b_of, x_of, gradient + c * o.after), mean, rstd,
                                  lane, plan.lanes, own, kept_b + c * plan.vectors, kept_x + c * plan.vectors);
      }
      team_sums(own, plan.lanes, exchange, turn ^= 1);
      if (lane == 0 && c < width) {
        sums[2 * c] = own[0];
        sums[2 * c + 1] = own[1];
      }
    }
    __syncthreads();
    double means[2] = {0.0, 0.0};
    for (int c = thread; c < width; c += plan.threads) {
      const double factor = weight != nullptr ? static_cast<double>(weight[channel + c]) : 1.0;
      means[0] += factor * sums[2 * c];
      means[1] += factor * sums[2 * c + 1];
      out.shift[image * o.channels + channel + c] = static_cast<A>(sums[2 * c]);
      out.scale[image * o.channels + channel + c] = static_cast<A>(sums[2 * c + 1]);
    }
    team_sums(means, plan.threads, exchange_means, turn_means ^= 1);  // its barrier also frees `sums` for the next unit
    const double elements = static_cast<double>(width) * static_cast<double>(o.after);
    const A p = static_cast<A>(means[0] / elements), q = static_cast<A>(means[1] / elements);
    for (int c = team; c < width; c += teams) {
      const S *b_of = b + c * o.b_channel_stride, *x_of = x + c * o.x_channel_stride;
      S* gradient_of = gradient + c * o.after;
      write_pixels<S, true>(b_of, x_of, gradient_of, o.after, span_of(o.after, b_of, x_of, gradient_of),
                            weight != nullptr ? weight[channel + c] : A(1), mean, rstd, p, q, lane, plan.lanes,
                            kept_b + c * plan.vectors, kept_x + c * plan.vectors);
    }
  }
}

// p and q of groups whose channels' sums are known. A block owns one group at a time.
template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    pixel_means_kernel(const core::Normalisation n, int64_t pieces, const Sums<A> sums,  // (B * T * pieces, d)
                       A* __restrict__ p, A* __restrict__ q) {                           // (B, T, G)
  __shared__ double exchange[2 * 32 * 2];
  int turn = 0;
  const core::Affine& o = n.affine;
  const int64_t width = o.channels / o.groups;
  for (int64_t index = blockIdx.x; index < o.batch * o.before * o.groups; index += gridDim.x) {
    const int64_t image = quotient(index, o.groups), channel = (index - image * o.groups) * width;
    double means[2] = {0.0, 0.0};
    for (int64_t c = channel + threadIdx.x; c < channel + width; c += kThreads) {
      const double weight = n.weight != nullptr ? static_cast<double>(static_cast<const A*>(n.weight)[c]) : 1.0;
      for (int64_t piece = image * pieces; piece < (image + 1) * pieces; ++piece) {
        means[0] += weight * static_cast<double>(sums.shift[piece * o.channels + c]);
        means[1] += weight * static_cast<double>(sums.scale[piece * o.channels + c]);
      }
    }
    team_sums(means, kThreads, exchange, turn ^= 1);
    const double elements = static_cast<double>(width) * static_cast<double>(o.after);
    if (threadIdx.x == 0) {
      p[index] = static_cast<A>(means[0] / elements);
      q[index] = static_cast<A>(means[1] / elements);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1) pixel_gradient_kernel(const core::Normalisation n, const PixelPlan plan,
                                                                     const Means<core::accumulation_t<S>> means) {
  using A = core::accumulation_t<S>;
  const core::Affine& o = n.affine;
  const int lane = static_cast<int>(threadIdx.x) % plan.lanes, team = static_cast<int>(threadIdx.x) / plan.lanes;
  const int64_t teams = kThreads / plan.lanes, count = plan.units(o) * o.channels;
  for (int64_t index = blockIdx.x * teams + team; index < count; index += gridDim.x * teams) {
    const Pixels own = pixels_at(o, plan, index);
    const int64_t group = quotient(own.channel * o.groups, o.channels);
    const int64_t means_at = (own.sample * o.before + own.before) * o.groups + group;
    const S* b = static_cast<const S*>(o.b) + own.sample * o.b_batch_stride + own.before * o.b_before_stride +
                 own.channel * o.b_channel_stride + own.first;
    const S* x = static_cast<const S*>(o.x) + own.sample * o.x_batch_stride + own.before * o.x_before_stride +
                 own.channel * o.x_channel_stride + own.first;
    S* gradient = static_cast<S*>(n.gradient) + own.sample * n.batch_stride + own.before * n.before_stride +
                  own.channel * o.after + own.first;
    const A mean = statistic(
        o.mean, own.sample * o.mean_batch_stride + own.before * o.mean_before_stride + group * o.mean_group_stride,
        A(0));
    const A rstd = statistic(
        o.rstd, own.sample * o.rstd_batch_stride + own.before * o.rstd_before_stride + group * o.rstd_group_stride,
        A(1));
    write_pixels<S, false>(b, x, gradient, own.length, span_of(own.length, b, x, gradient),
                           statistic(n.weight, own.channel, A(1)), mean, rstd, means.p[means_at], means.q[means_at],
                           lane, plan.lanes, nullptr, nullptr);
  }
}

// --- which way ---

// The way for a layer, and the layout of the workspace: sums, norms of tiles, p and q.
template <class S>
struct Way {
  using A = core::accumulation_t<S>;
  enum { kRows, kLongRows, kRowsTwice, kGroups, kPixelsTwice } kind;
  RowPlan rows{};
  PixelPlan pixels{};
  GroupPlan group{};
  bool aligned;
  int64_t units, tiles = 0;

  explicit Way(const core::Normalisation& n) : aligned(rows_aligned(n, sizeof(S))) {
    const core::Affine& o = n.affine;
    const int64_t vectors = core::ceil_div(o.channels, kVector<S>);
    if (o.after != 1) {
      group = group_plan<S>(o);
      pixels = pixel_plan<S>(o);
      kind = group.shared_bytes > 0 ? kGroups : kPixelsTwice;
      units = kind == kGroups ? o.batch * o.before : pixels.units(o);
      return;
    }
    if (o.groups == 1 && vectors <= kBlock) {
      kind = kRows;
      rows = row_plan<S, 1, kStages>(o, team_of(vectors), kBlock);
    } else if (o.groups == 1 && aligned && vectors <= kLongBlock * kLongVectors<S>) {
      kind = kLongRows;
      const int lanes = team_of(core::ceil_div(vectors, kLongVectors<S>));
      rows = row_plan<S, kLongVectors<S>, kLongStages, false>(o, lanes, lanes);  // one team
    } else {
      kind = kRowsTwice;
      rows = row_plan<S, 1, kStages>(o, power_of_two(vectors, 32), kThreads);
    }
    units = rows.units;
    tiles = rows.tiles;
  }
  static int team_of(int64_t threads) {
    return threads <= 32 ? power_of_two(threads, 32) : static_cast<int>(core::round_up(threads, 32));
  }
  bool twice() const { return kind == kRowsTwice || kind == kPixelsTwice; }
  int64_t sums_bytes(const core::Affine& o) const { return cuda::sums_bytes<A>(o, units, tiles); }
  int64_t means_bytes(const core::Affine& o) const {
    return twice() ? 2 * o.batch * o.before * o.groups * static_cast<int64_t>(sizeof(A)) : 0;
  }
};

template <class S, bool kAligned>
cudaError_t launch_rows(const core::Normalisation& n, const Way<S>& way, const Sums<core::accumulation_t<S>>& sums,
                        core::accumulation_t<S>* p, core::accumulation_t<S>* q, cudaStream_t stream) {
  const core::Affine& o = n.affine;
  const Launch shape = way.rows.launch();
  if (way.kind == Way<S>::kRows) {
    return way.rows.own ? launch(norm_affine_kernel<S, kAligned, kSamples>, shape, stream, n, way.rows, sums)
                        : launch(norm_affine_kernel<S, kAligned, kPieces>, shape, stream, n, way.rows, sums);
  }
  if (way.kind == Way<S>::kLongRows) return launch(norm_affine_long_kernel<S>, shape, stream, n, way.rows, sums);
  const int lanes = o.channels / o.groups >= 4096 ? kThreads : 32;
  const int64_t blocks = core::ceil_div(o.batch * o.before * o.groups * lanes, kThreads);
  const Launch of_means{grid_for(blocks), kThreads};
  if (blocks == 0) {
    // no positions: the sums are zeros, and there is no gradient
  } else if (kAligned && o.channels / o.groups % kVector<S> == 0) {
    GHOSTGRAD_TRY(launch(row_means_kernel<S, kVector<S>>, of_means, stream, n, lanes, p, q));
  } else {
    GHOSTGRAD_TRY(launch(row_means_kernel<S, 1>, of_means, stream, n, lanes, p, q));
  }
  const Means<core::accumulation_t<S>> means{p, q};
  if (o.groups == 1) {
    return launch(row_gradient_kernel<S, kAligned, true>, shape, stream, n, way.rows, means, sums);
  }
  return launch(row_gradient_kernel<S, kAligned, false>, shape, stream, n, way.rows, means, sums);
}

template <class S>
cudaError_t launch_pixels(const core::Normalisation& n, const Way<S>& way, const Sums<core::accumulation_t<S>>& sums,
                          core::accumulation_t<S>* p, core::accumulation_t<S>* q, cudaStream_t stream) {
  using A = core::accumulation_t<S>;
  const core::Affine& o = n.affine;
  const int groups = grid_for(o.batch * o.before * o.groups);
  if (way.kind == Way<S>::kGroups) {
    const Launch shape{groups, way.group.threads, way.group.shared_bytes};
    return launch(norm_affine_group_kernel<S>, shape, stream, n, way.group, sums);
  }
  const Launch shape = way.pixels.launch(o);
  GHOSTGRAD_TRY(launch(pixel_sums_kernel<S, true>, shape, stream, o, way.pixels, sums));
  GHOSTGRAD_TRY(launch(pixel_means_kernel<A>, Launch{groups, kThreads}, stream, n, way.pixels.pieces, sums, p, q));
  return launch(pixel_gradient_kernel<S>, shape, stream, n, way.pixels, Means<A>{p, q});
}

template <class S>
cudaError_t run(const core::Normalisation& n, const core::AffineResults& results, void* workspace,
                cudaStream_t stream) {
  using A = core::accumulation_t<S>;
  const core::Affine& o = n.affine;
  const Way<S> way(n);
  const Sums<A> sums = sums_in<A>(workspace, o, way.units, way.tiles, results);
  A* p = reinterpret_cast<A*>(static_cast<unsigned char*>(workspace) + way.sums_bytes(o));  // (B, T, G)
  A* q = p + o.batch * o.before * o.groups;
  if (o.after != 1) {
    if (way.units * o.channels > 0) GHOSTGRAD_TRY(launch_pixels<S>(n, way, sums, p, q, stream));
    const int64_t pieces = o.before * (way.kind == Way<S>::kGroups ? 1 : way.pixels.pieces);
    return finish(o, sums, way.units, false, pieces, 0, results, stream);
  }
  if (way.units * way.tiles > 0) {
    GHOSTGRAD_TRY((way.aligned ? launch_rows<S, true>(n, way, sums, p, q, stream)
                               : launch_rows<S, false>(n, way, sums, p, q, stream)));
  }
  return finish(o, sums, way.units, way.rows.own, way.rows.pieces, way.tiles, results, stream);
}

template <class S>
int64_t workspace_bytes(const core::Normalisation& n) {
  const Way<S> way(n);
  return way.sums_bytes(n.affine) + way.means_bytes(n.affine);
}

}  // namespace

int64_t norm_affine_workspace(const core::Normalisation& normalisation) {
  GHOSTGRAD_FOR_DTYPE(normalisation.affine.dtype, workspace_bytes, normalisation)
  return 0;
}

cudaError_t launch_norm_affine(const core::Normalisation& normalisation, const core::AffineResults& results,
                               void* workspace, cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(normalisation.affine.dtype, run, normalisation, results, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
