// affine_sqnorm on CUDA: gradients of a scale and a shift, summed over the batch and their squared norms, bound by
// reading the operands once.
//
// A block owns a tile of kChannels = 32 channels for a run of samples. With the channels adjacent in memory a lane owns
// a channel and the block's eight warps take turns at the positions; with positions adjacent a warp owns a channel at a
// time and its lanes take turns at the positions. Either way neighbours read neighbours, a thread adds at most kAtOnce
// products in the accumulation type before its sum moves on to float64, and the sums meet in shared memory (4 KiB),
// where the first warp makes the sample's gradient of them: one lane, one channel. It squares them, adds the lanes and
// writes partial (B, tiles), and keeps the total of its channel in a register. Runs of samples write totals of their
// own to the workspace, which a second kernel adds in order. No atomics: the same inputs give the same bits.
#include "core/storage.h"
#include "cuda/affine_sqnorm.h"
#include "cuda/reduce.cuh"

namespace ghostgrad::cuda {
namespace {

constexpr int kChannels = 32;
constexpr int kAtOnce = 64;
constexpr int64_t kUnits = 4096;  // blocks wanted; as many totals of a tile, 512 bytes each

struct Shape {
  int64_t tiles, run_length, runs;
};

Shape shape_of(const core::Affine& o) {
  const int64_t tiles = core::ceil_div(o.channels, kChannels);
  const int64_t wanted = core::minimum(o.batch, core::maximum(1, kUnits / core::maximum(1, tiles)));
  const int64_t run_length = core::maximum(1, core::ceil_div(o.batch, core::maximum(1, wanted)));
  return Shape{tiles, run_length, core::ceil_div(o.batch, run_length)};
}

struct Sums {
  double scale = 0.0, shift = 0.0;
};

// Adds to `sums` this thread's share of the positions of one channel of one sample: those of its lane along memory, at
// position `before` of the others, or those of its warp along the dimension before the channels.
template <class S>
__device__ __forceinline__ void sum_positions(const core::Affine& o, int64_t sample, int64_t before, int64_t channel,
                                              bool adjacent, Sums& sums) {
  using A = core::accumulation_t<S>;
  const int64_t count = adjacent ? o.after : o.before, group = channel * o.groups / o.channels;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int step = adjacent ? 32 : kWarps;
  const int64_t b_stride = adjacent ? 1 : o.b_before_stride, x_stride = adjacent ? 1 : o.x_before_stride;
  const int64_t mean_stride = adjacent ? 0 : o.mean_before_stride, rstd_stride = adjacent ? 0 : o.rstd_before_stride;
  const S* b = static_cast<const S*>(o.b) + sample * o.b_batch_stride + before * o.b_before_stride +
               channel * o.b_channel_stride;
  const S* x = static_cast<const S*>(o.x) + sample * o.x_batch_stride + before * o.x_before_stride +
               channel * o.x_channel_stride;
  const A* mean = static_cast<const A*>(o.mean) + sample * o.mean_batch_stride + before * o.mean_before_stride +
                  group * o.mean_group_stride;
  const A* rstd = static_cast<const A*>(o.rstd) + sample * o.rstd_batch_stride + before * o.rstd_before_stride +
                  group * o.rstd_group_stride;
  for (int64_t from = adjacent ? lane : warp; from < count; from += kAtOnce * step) {
    const int64_t to = core::minimum(count, from + kAtOnce * step);
    A scale = A(0), shift = A(0);
#pragma unroll 4
    for (int64_t p = from; p < to; p += step) {
      const A gradient = core::to_accumulation(b[p * b_stride]);
      shift += gradient;
      if (o.scaled) {
        A value = core::to_accumulation(x[p * x_stride]);
        if (o.mean != nullptr) value -= mean[p * mean_stride];
        if (o.rstd != nullptr) value *= rstd[p * rstd_stride];
        scale += value * gradient;
      }
    }
    sums.scale += static_cast<double>(scale);
    sums.shift += static_cast<double>(shift);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) affine_sqnorm_kernel(const core::Affine o, const Shape shape,
                                                                 double* __restrict__ scale_partial,  // (B, tiles)
                                                                 double* __restrict__ shift_partial,
                                                                 double* __restrict__ scale_total,  // (runs, d) or null
                                                                 double* __restrict__ shift_total) {
  __shared__ double scales[kWarps][kChannels], shifts[kWarps][kChannels];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const bool adjacent = o.after != 1;
  for (int64_t unit = blockIdx.x; unit < shape.tiles * shape.runs; unit += gridDim.x) {
    const int64_t tile = unit % shape.tiles, run = unit / shape.tiles;
    const int64_t channel = tile * kChannels + lane;
    Sums total;
    const int64_t last = core::minimum((run + 1) * shape.run_length, o.batch);
    for (int64_t sample = run * shape.run_length; sample < last; ++sample) {
      for (int c = adjacent ? warp : lane; c < kChannels; c += adjacent ? kWarps : kChannels) {
        Sums sums;
        const int64_t outer = adjacent ? o.before : 1;
        for (int64_t before = 0; before < outer && tile * kChannels + c < o.channels; ++before) {
          sum_positions<S>(o, sample, before, tile * kChannels + c, adjacent, sums);
        }
        if (adjacent) {
          sums.scale = warp_sum(sums.scale);
          sums.shift = warp_sum(sums.shift);
        }
        if (!adjacent || lane == 0) {
          scales[adjacent ? 0 : warp][c] = sums.scale;
          shifts[adjacent ? 0 : warp][c] = sums.shift;
        }
      }
      __syncthreads();
      if (warp == 0) {
        Sums gradient;
        for (int w = 0; w < (adjacent ? 1 : kWarps); ++w) {
          gradient.scale += scales[w][lane];
          gradient.shift += shifts[w][lane];
        }
        total.scale += gradient.scale;
        total.shift += gradient.shift;
        const double scale = warp_sum(gradient.scale * gradient.scale);
        const double shift = warp_sum(gradient.shift * gradient.shift);
        if (lane == 0) {
          scale_partial[sample * shape.tiles + tile] = scale;
          shift_partial[sample * shape.tiles + tile] = shift;
        }
      }
      __syncthreads();  // nobody overwrites the sums before the first warp has read them
    }
    if (shift_total != nullptr && warp == 0 && channel < o.channels) {
      scale_total[run * o.channels + channel] = total.scale;
      shift_total[run * o.channels + channel] = total.shift;
    }
  }
}

// A thread owns one channel at a time and adds its runs in order.
template <class A>
__global__ void __launch_bounds__(kThreads) add_totals(const double* __restrict__ run_total,  // (runs, d)
                                                       int64_t runs, int64_t channels,
                                                       A* __restrict__ total) {  // (d,)
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c < channels; c += threads) {
    double sum = 0.0;
    for (int64_t run = 0; run < runs; ++run) sum += run_total[run * channels + c];
    total[c] = static_cast<A>(sum);
  }
}

template <class A>
cudaError_t finish(const core::Affine& o, const Shape& shape, const double* partial, const double* run_total,
                   void* total, void* sqnorm, cudaStream_t stream) {
  if (total != nullptr && o.channels > 0) {
    const int grid = grid_for(core::ceil_div(o.channels, kThreads));
    GHOSTGRAD_TRY(launch(add_totals<A>, Launch{grid, kThreads}, stream, run_total, shape.runs, o.channels,
                         static_cast<A*>(total)));
  }
  return launch_add_partials(partial, o.batch, shape.tiles, static_cast<A*>(sqnorm), stream);
}

template <class S>
cudaError_t run(const core::Affine& o, const core::AffineResults& results, void* workspace, cudaStream_t stream) {
  using A = core::accumulation_t<S>;
  const Shape shape = shape_of(o);
  const bool total = results.shift != nullptr;
  double* scale_partial = static_cast<double*>(workspace);  // (B, tiles)
  double* shift_partial = scale_partial + o.batch * shape.tiles;
  double* scale_total = shift_partial + o.batch * shape.tiles;  // (runs, d)
  double* shift_total = scale_total + shape.runs * o.channels;
  if (o.batch * shape.tiles > 0) {
    GHOSTGRAD_TRY(launch(affine_sqnorm_kernel<S>, Launch{grid_for(shape.tiles * shape.runs), kThreads}, stream, o,
                         shape, scale_partial, shift_partial, total ? scale_total : nullptr,
                         total ? shift_total : nullptr));
  }
  if (o.scaled) {
    GHOSTGRAD_TRY(finish<A>(o, shape, scale_partial, scale_total, results.scale, results.scale_sqnorm, stream));
  }
  return finish<A>(o, shape, shift_partial, shift_total, results.shift, results.shift_sqnorm, stream);
}

}  // namespace

int64_t affine_sqnorm_workspace(const core::Affine& affine) {
  const Shape shape = shape_of(affine);
  return 2 * (affine.batch * shape.tiles + shape.runs * affine.channels) * static_cast<int64_t>(sizeof(double));
}

cudaError_t launch_affine_sqnorm(const core::Affine& affine, const core::AffineResults& results, void* workspace,
                                 cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(affine.dtype, run, affine, results, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
