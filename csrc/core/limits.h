// What the CUDA kernels count in 32 bits: samples, positions, features, channels, places in an image. Offsets into
// memory have 64 bits everywhere, and units of work, too.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/operands.h"

namespace ghostgrad::core {

// Below 2^31 by far enough for the last tile, run and step to end beyond it.
constexpr int64_t kCountable = int64_t{1} << 30;

GHOSTGRAD_HD constexpr bool countable(const Operands& o) {
  return o.batch <= kCountable && o.positions <= kCountable && o.in_features <= kCountable &&
         o.out_features <= kCountable;
}

// A block has at least 64 positions or a whole sample, and blocks are counted, too.
GHOSTGRAD_HD constexpr bool countable(const Affine& o) {
  return o.batch <= kCountable && o.channels <= kCountable &&
         static_cast<double>(o.batch) * static_cast<double>(o.before) <= 64.0 * static_cast<double>(kCountable);
}

GHOSTGRAD_HD constexpr bool countable(const Convolution& c) {
  for (int i = 0; i < 3; ++i) {
    if (c.padding[i] > kCountable || c.stride[i] > kCountable || c.dilation[i] > kCountable ||
        c.kernel[i] > kCountable || c.out[i] > kCountable) {
      return false;
    }
    // From the first element that the first position sees, padding included, to the last one of the last: stride and
    // dilation, which take the size of the image no further than that.
    const int64_t reach = (c.out[i] - 1) * c.stride[i] + (c.kernel[i] - 1) * c.dilation[i];
    if (reach > kCountable) return false;
  }
  // As floating-point numbers: these are products, which might not fit 64 bits.
  double positions = static_cast<double>(c.runs), in_features = static_cast<double>(c.group_channels());
  for (int i = 0; i < 3; ++i) {
    positions *= static_cast<double>(c.out[i]);
    in_features *= static_cast<double>(c.kernel[i]);
  }
  constexpr double kMost = static_cast<double>(kCountable);
  return c.batch <= kCountable && c.group_outputs() <= kCountable && positions <= kMost && in_features <= kMost;
}

}  // namespace ghostgrad::core
