#pragma once

#include "core/macros.h"

namespace ghostgrad::core {

// (plus - zero) - (zero - minus) over sigma^2. Losses of narrower types are differenced without rounding as long as
// they are within a factor of 2^29 of each other: that is all that float64 can do for them.
GHOSTGRAD_HD double second_difference(double plus, double zero, double minus, double sigma) {
  return ((plus - zero) - (zero - minus)) / (sigma * sigma);
}

}  // namespace ghostgrad::core
