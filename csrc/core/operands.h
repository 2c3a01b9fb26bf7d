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
  bool tf32 = false;  // float32 operands may be rounded to 10 bits of mantissa, as the tensor cores of a GPU want them
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
  bool tf32 = false;  // as in Operands

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

// The operands of embedding_sqnorm: the gradient at each position and the row of the table that it belongs to. The last
// dimension of b has unit stride, the other strides are free. Positions of a negative index belong to no row.
struct Picks {
  const void* index;  // (batch, positions)
  bool wide_index;    // int64, else int32
  const void* b;      // (batch, positions, features)
  DType dtype;        // of b
  int64_t batch;      // B
  int64_t positions;  // T, at most 2^30
  int64_t features;   // d
  int64_t index_batch_stride, index_position_stride;
  int64_t b_batch_stride, b_position_stride;

  GHOSTGRAD_HD int64_t token(int64_t sample, int64_t position) const {
    const int64_t at = sample * index_batch_stride + position * index_position_stride;
    return wide_index ? static_cast<const int64_t*>(index)[at] : static_cast<const int32_t*>(index)[at];
  }
};

// The operands of affine_sqnorm: gradients `b` at the output of a layer whose scale or shift broadcasts over positions,
// and what the scale multiplied, (x - mean) * rstd. Either the channels are adjacent in memory and `after` is 1
// (channels last), or the positions after them are (channels first); the other strides, in elements, are free.
struct Affine {
  const void* b;     // (batch, before, channels, after)
  bool scaled;       // otherwise there is no x, and the shift alone is wanted
  const void* x;     // (batch, before, channels, after)
  const void* mean;  // (batch, before, groups) in the accumulation type, or null for zero
  const void* rstd;  // the same, or null for one
  DType dtype;       // of b and x
  int64_t batch;     // B
  int64_t before;    // T, positions before the channels
  int64_t channels;  // d
  int64_t after;     // S, positions after the channels
  int64_t groups;    // of channels with common statistics
  int64_t b_batch_stride, b_before_stride, b_channel_stride;
  int64_t x_batch_stride, x_before_stride, x_channel_stride;
  int64_t mean_batch_stride, mean_before_stride, mean_group_stride;
  int64_t rstd_batch_stride, rstd_before_stride, rstd_group_stride;
};

// Where affine_sqnorm puts its results, all in the accumulation type. The sums are null if they are not wanted;
// those of the scale are not touched if there is none.
struct AffineResults {
  void* scale;         // (channels,)
  void* scale_sqnorm;  // (batch,)
  void* shift;         // (channels,)
  void* shift_sqnorm;  // (batch,)
};

// The operands of norm_affine: those of affine_sqnorm with mean and rstd, which are those of x over each group of
// channels, `after` included. `before` comes before the channels in any case. The gradient's last dimension has unit
// stride and the channels lie `after` apart.
struct Normalisation {
  Affine affine;
  const void* weight;  // (channels,) in the accumulation type, or null for ones
  void* gradient;      // of x, (batch, before, channels, after)
  int64_t batch_stride, before_stride;
};

}  // namespace ghostgrad::core
