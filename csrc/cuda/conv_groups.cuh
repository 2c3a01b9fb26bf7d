// Convolutions of many small groups, depthwise ones above all, of which a tile of conv_product.cuh would be mostly
// padding.
//
// A warp owns one group for a run of samples. Its lanes take turns at the positions, and have kAtOnce elements of G_i
// in registers at a time; a shared table says where each element's factors lie, relative to the position. Sums of lanes
// are added in float64 and squared by the first lane, which writes partial (B, groups) and keeps the sum over samples
// in shared memory. Neighbouring lanes read neighbouring positions, so width should be the dimension that is adjacent.
#pragma once

#include "cuda/conv_product.cuh"

namespace ghostgrad::cuda {
namespace {

constexpr int kAtOnce = 8;
constexpr int kGroupElements = 128;  // of the weight of a group, at most; about where a tile would be as fast

inline bool small_groups(const core::Convolution& o) {
  return o.groups > 1 && o.elements() > 0 && o.elements() / o.groups <= kGroupElements;
}

struct GroupRuns {
  int64_t length, count;
};
// Weight gradients of runs are small here: there may be many.
inline GroupRuns group_runs_of(const core::Convolution& o) {
  const int64_t blocks = core::ceil_div(o.groups, kWarps);
  const int64_t wanted = core::minimum(core::maximum(1, 4 * kUnits / blocks), core::maximum(1, o.batch));
  const int64_t length = core::maximum(1, core::ceil_div(o.batch, wanted));
  return GroupRuns{length, core::maximum(1, core::ceil_div(o.batch, length))};
}

// Of one element of G_i: where its factors lie, from where the position and the group are.
struct GroupElement {
  int64_t x, b;
  int shift[3];
};

// Out is the operands' type when there is one run and the result is final, that of sums when runs are added later.
template <class S, class Out>
__global__ void __launch_bounds__(kThreads, 2)
    conv_groups_kernel(const core::Convolution o, const GroupRuns runs,
                       Out* __restrict__ wgrad,         // (runs, groups, d, p) or null
                       double* __restrict__ partial) {  // (B, groups)
  using A = core::accumulation_t<S>;
  __shared__ GroupElement table[kGroupElements];
  __shared__ double running[kWarps][kGroupElements];
  const int elements = static_cast<int>(o.group_outputs() * o.in_features());
  const int positions = static_cast<int>(o.positions());
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int e = static_cast<int>(threadIdx.x); e < elements; e += kThreads) {
    int feature = e % static_cast<int>(o.in_features());
    GroupElement& element = table[e];
    for (int i = 2; i >= 0; --i) {
      const int size = static_cast<int>(o.kernel[i]);
      element.shift[i] = feature % size * static_cast<int>(o.dilation[i]) - static_cast<int>(o.padding[i]);
      feature /= size;
    }
    element.b = e / static_cast<int>(o.in_features()) * o.b_strides[2];
    element.x = feature * o.x_strides[2];
    for (int i = 0; i < 3; ++i) element.x += element.shift[i] * o.x_strides[3 + i];
  }
  __syncthreads();

  const int64_t blocks = core::ceil_div(o.groups, kWarps);
  for (int64_t unit = blockIdx.x; unit < blocks * runs.count; unit += gridDim.x) {
    const int64_t group = unit % blocks * kWarps + warp, run = unit / blocks;
    if (group >= o.groups) continue;  // warps do not wait for each other from here on
    const int64_t last = core::minimum((run + 1) * runs.length, o.batch);
    for (int64_t sample = run * runs.length; sample < last; ++sample) {
      const S* x = static_cast<const S*>(o.x) + sample * o.x_strides[0] + group * o.group_channels() * o.x_strides[2];
      const S* b = static_cast<const S*>(o.b) + sample * o.b_strides[0] + group * o.group_outputs() * o.b_strides[2];
      double squares = 0.0;
      for (int first = 0; first < elements; first += kAtOnce) {
        A sums[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) sums[i] = A(0);
        for (int t = lane; t < positions; t += 32) {
          const ConvPosition at = conv_position(o, t);
          const S* here_b = b + at.run * o.b_strides[1];
          const S* here_x = x + at.run * o.x_strides[1];
          int place[3];
#pragma unroll
          for (int dim = 0; dim < 3; ++dim) {
            place[dim] = at.place[dim] * static_cast<int>(o.stride[dim]);
            here_b += at.place[dim] * o.b_strides[3 + dim];
            here_x += place[dim] * o.x_strides[3 + dim];
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const GroupElement& element = table[first + i];
            bool inside = first + i < elements;
#pragma unroll
            for (int dim = 0; dim < 3; ++dim) {
              const int where = place[dim] + element.shift[dim];
              inside = inside && where >= 0 && where < o.size[dim];
            }
            if (inside) sums[i] += core::to_accumulation(here_x[element.x]) * core::to_accumulation(here_b[element.b]);
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const double sum = warp_sum(static_cast<double>(sums[i]));
          if (lane != 0 || first + i >= elements) continue;
          squares += sum * sum;
          running[warp][first + i] = sum + (sample == run * runs.length ? 0.0 : running[warp][first + i]);
        }
      }
      if (lane == 0) partial[sample * o.groups + group] = squares;
    }
    if (wgrad == nullptr || lane != 0) continue;
    Out* to = wgrad + (run * o.groups + group) * elements;
    for (int e = 0; e < elements; ++e) {
      const double sum = o.batch == 0 ? 0.0 : running[warp][e];
      to[e] = core::from_accumulation<Out>(static_cast<A>(sum));
    }
  }
}

template <class S, class Out>
cudaError_t launch_conv_groups(const core::Convolution& o, const GroupRuns& runs, Out* wgrad, double* partial,
                               cudaStream_t stream) {
  const int64_t units = core::ceil_div(o.groups, kWarps) * runs.count;
  return launch(conv_groups_kernel<S, Out>, Launch{grid_for(units), kThreads}, stream, o, runs, wgrad, partial);
}

}  // namespace
}  // namespace ghostgrad::cuda
