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

}  // namespace ghostgrad::core
