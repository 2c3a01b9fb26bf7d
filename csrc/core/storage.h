// From a DType at run time to a type at compile time.
#pragma once

#include "core/dtype.h"

// Calls FUNCTION<S>(...) with S the storage type of DTYPE.
#define GHOSTGRAD_FOR_DTYPE(DTYPE, FUNCTION, ...)                \
  switch (DTYPE) {                                               \
    case ::ghostgrad::core::DType::kFloat32:                     \
      return FUNCTION<float>(__VA_ARGS__);                       \
    case ::ghostgrad::core::DType::kFloat64:                     \
      return FUNCTION<double>(__VA_ARGS__);                      \
    case ::ghostgrad::core::DType::kBFloat16:                    \
      return FUNCTION<::ghostgrad::core::BFloat16>(__VA_ARGS__); \
    case ::ghostgrad::core::DType::kFloat16:                     \
      return FUNCTION<::ghostgrad::core::Float16>(__VA_ARGS__);  \
  }
