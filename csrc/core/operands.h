// What a product kernel is given: plain pointers, sizes and strides. Bindings fill it, kernels of both backends read
// it.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace ghostgrad::core {

// The operands of the per-sample product G_i = b_i^T a_i. The last dimension of both has unit stride; the other
// strides, in elements, are free, zero included (expanded tensors).
struct Operands {
  const void* a;         // (batch, positions, in_features)    activations
  const void* b;         // (batch, positions, out_features)   gradients at the output
  DType dtype;           // of both
  int64_t batch;         // B
  int64_t positions;     // T
  int64_t in_features;   // p
  int64_t out_features;  // d
  int64_t a_batch_stride, a_position_stride;
  int64_t b_batch_stride, b_position_stride;
};

// The operands of a convolution's weight gradient, (out_channels, channels / groups, *kernel): one product of output
// gradients and input patches per sample,
//
//   G_i[o, c, k] = sum_{r, t} b[i, r, o, t] * x[i, r, c', t * stride + k * dilation - padding]
//
// with c' the channel c of the group that o belongs to, and x zero outside of its size. There are always three spatial
// dimensions; those that are missing come first, have size, kernel, stride and dilation 1 and no padding. Strides are
// in elements and free.
struct Convolution {
  const void* x;  // (batch, runs, channels, *size)
  const void* b;  // (batch, runs, out_channels, *out)
  DType dtype;    // of both
  int64_t batch;  // B
  int64_t runs;   // of the convolution, that belong to each sample
  int64_t channels, out_channels, groups;
  int64_t size[3], out[3], kernel[3];
  int64_t stride[3], padding[3], dilation[3];
  int64_t x_strides[6], b_strides[6];

  // As a product: T positions, p in-features and d out-features of each group.
  GHOSTGRAD_HD int64_t positions() const { return runs * out[0] * out[1] * out[2]; }
  GHOSTGRAD_HD int64_t offsets() const { return kernel[0] * kernel[1] * kernel[2]; }
  GHOSTGRAD_HD int64_t group_channels() const { return channels / groups; }
  GHOSTGRAD_HD int64_t group_outputs() const { return out_channels / groups; }
  GHOSTGRAD_HD int64_t in_features() const { return group_channels() * offsets(); }
  GHOSTGRAD_HD int64_t elements() const { return out_channels * in_features(); }
};

// The operand of row_sqnorm: rows of `length` adjacent elements.
struct Rows {
  const void* x;  // (batch, length)
  DType dtype;
  int64_t batch;   // B
  int64_t length;  // N
  int64_t batch_stride;
};

}  // namespace ghostgrad::core
