// Convolutions to try the kernels on, and their per-sample weight gradients by loops in long double.
#pragma once

#include <cstdint>
#include <vector>

#include "core/operands.h"

namespace convolutions {

using ghostgrad::core::Convolution;

// `channels_last`: strides of (batch, runs, *size, channels), else of (batch, runs, channels, *size). Of the output,
// `missing` lines are left out.
struct Case {
  int64_t batch, runs, group_channels, group_outputs, groups;
  int64_t size[3], kernel[3], stride[3], padding[3], dilation[3];
  bool channels_last;
  int64_t missing;
};

inline const Case kCases[] = {
    {0, 1, 2, 3, 1, {1, 5, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, false, 0},     // no samples
    {2, 0, 2, 3, 1, {1, 5, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, false, 0},     // no positions
    {2, 1, 0, 3, 1, {1, 5, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, false, 0},     // no channels
    {2, 1, 2, 0, 1, {1, 5, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, false, 0},     // no outputs
    {1, 1, 1, 1, 1, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, false, 0},     // one of everything
    {3, 1, 3, 16, 1, {1, 20, 33}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, false, 0},  // one vector, several strips
    {2, 2, 5, 37, 1, {1, 9, 8}, {1, 3, 2}, {1, 2, 1}, {0, 1, 0}, {1, 1, 2}, true, 0},     // runs, a rest of a vector
    {2, 1, 40, 70, 1, {1, 7, 17}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, true, 0},
    {2, 1, 70, 5, 1, {1, 4, 16}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, false, 0},   // rows without padding
    {2, 1, 1, 1, 20, {1, 9, 9}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, {1, 1, 1}, false, 0},    // depthwise, a rest of groups
    {2, 1, 2, 3, 17, {1, 5, 19}, {1, 2, 3}, {1, 1, 1}, {0, 3, 4}, {1, 2, 1}, true, 0},    // padding beyond the kernel
    {2, 1, 4, 20, 3, {1, 6, 5}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, false, 0},    // groups of many outputs
    {2, 1, 2, 4, 1, {1, 1, 1200}, {1, 1, 5}, {1, 1, 3}, {0, 0, 2}, {1, 1, 4}, false, 0},  // a line longer than a strip
    {2, 1, 2, 3, 2, {5, 6, 7}, {2, 3, 2}, {2, 1, 3}, {1, 2, 0}, {1, 2, 3}, false, 0},
    {2, 1, 3, 4, 1, {4, 9, 9}, {3, 2, 2}, {1, 2, 2}, {1, 0, 1}, {1, 1, 1}, true, 1},  // the output ends early
    {70, 1, 2, 3, 1, {1, 4, 4}, {1, 2, 2}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, false, 0},
    {1100, 1, 1, 2, 1, {1, 1, 2}, {1, 1, 2}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, false, 0},  // a run of many samples
    {1, 1, 130, 70, 1, {1, 3, 3}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, false, 0},  // several tiles
};

// x and b are missing still.
inline Convolution convolution(const Case& c, ghostgrad::core::DType dtype) {
  Convolution o{};
  o.dtype = dtype;
  o.batch = c.batch;
  o.runs = c.runs;
  o.channels = c.group_channels * c.groups;
  o.out_channels = c.group_outputs * c.groups;
  o.groups = c.groups;
  for (int i = 0; i < 3; ++i) {
    o.size[i] = c.size[i];
    o.kernel[i] = c.kernel[i];
    o.stride[i] = c.stride[i];
    o.padding[i] = c.padding[i];
    o.dilation[i] = c.dilation[i];
    o.out[i] = (c.size[i] + 2 * c.padding[i] - c.dilation[i] * (c.kernel[i] - 1) - 1) / c.stride[i] + 1 - c.missing;
  }
  const auto set_strides = [&](int64_t* strides, int64_t channels, const int64_t* size) {
    int64_t next = 1;
    if (c.channels_last) {
      strides[2] = 1;
      next = channels;
    }
    for (int i = 2; i >= 0; --i) {
      strides[3 + i] = next;
      next *= size[i];
    }
    if (!c.channels_last) {
      strides[2] = next;
      next *= channels;
    }
    strides[1] = next;
    strides[0] = next * c.runs;
  };
  set_strides(o.x_strides, o.channels, o.size);
  set_strides(o.b_strides, o.out_channels, o.out);
  return o;
}

inline int64_t x_elements(const Convolution& o) { return o.batch * o.x_strides[0]; }
inline int64_t b_elements(const Convolution& o) { return o.batch * o.b_strides[0]; }

// All G_i, (batch, out_channels, channels / groups, *kernel), as long double.
template <class S>
std::vector<long double> per_sample_wgrad(const Convolution& o) {
  const S* x = static_cast<const S*>(o.x);
  const S* b = static_cast<const S*>(o.b);
  std::vector<long double> result(static_cast<size_t>(o.batch * o.elements()));
  for (int64_t e = 0; e < o.batch * o.elements(); ++e) {
    const int64_t sample = e / o.elements(), out_channel = e % o.elements() / o.in_features();
    const int64_t feature = e % o.in_features(), k = feature % o.offsets();
    const int64_t channel = out_channel / o.group_outputs() * o.group_channels() + feature / o.offsets();
    const int64_t offset[3] = {k / (o.kernel[1] * o.kernel[2]), k / o.kernel[2] % o.kernel[1], k % o.kernel[2]};
    long double sum = 0;
    for (int64_t t = 0; t < o.positions(); ++t) {
      const int64_t place[4] = {t / (o.out[0] * o.out[1] * o.out[2]), t / (o.out[1] * o.out[2]) % o.out[0],
                                t / o.out[2] % o.out[1], t % o.out[2]};
      int64_t x_at = sample * o.x_strides[0] + place[0] * o.x_strides[1] + channel * o.x_strides[2];
      int64_t b_at = sample * o.b_strides[0] + place[0] * o.b_strides[1] + out_channel * o.b_strides[2];
      bool inside = true;
      for (int i = 0; i < 3; ++i) {
        const int64_t at = place[1 + i] * o.stride[i] + offset[i] * o.dilation[i] - o.padding[i];
        inside = inside && at >= 0 && at < o.size[i];
        x_at += at * o.x_strides[3 + i];
        b_at += place[1 + i] * o.b_strides[3 + i];
      }
      if (!inside) continue;
      sum += static_cast<long double>(ghostgrad::core::to_accumulation(x[x_at])) *
             static_cast<long double>(ghostgrad::core::to_accumulation(b[b_at]));
    }
    result[static_cast<size_t>(e)] = sum;
  }
  return result;
}

}  // namespace convolutions
