// The DType of an element type.
#pragma once

#include "core/dtype.h"

template <class S>
inline constexpr ghostgrad::core::DType kDType = ghostgrad::core::DType::kFloat32;
template <>
inline constexpr ghostgrad::core::DType kDType<double> = ghostgrad::core::DType::kFloat64;
template <>
inline constexpr ghostgrad::core::DType kDType<ghostgrad::core::BFloat16> = ghostgrad::core::DType::kBFloat16;
template <>
inline constexpr ghostgrad::core::DType kDType<ghostgrad::core::Float16> = ghostgrad::core::DType::kFloat16;
