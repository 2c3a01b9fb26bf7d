// Element types: how each is stored, and the type its sums are kept in.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace ghostgrad::core {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Storage formats of 16 bits. They hold bits and nothing else: arithmetic happens after to_accumulation().
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which products and squares of T are summed: float64 for float64, float32 for everything narrower.
template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class T>
using accumulation_t = typename Accumulation<T>::type;

GHOSTGRAD_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
GHOSTGRAD_HD uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

GHOSTGRAD_HD float to_accumulation(float value) { return value; }
GHOSTGRAD_HD double to_accumulation(double value) { return value; }
GHOSTGRAD_HD float to_accumulation(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

// IEEE half to float without branches. Shifted into place, the exponent of a half is 112 too small; a multiplication by
// 2^112 repairs it, exactly, for normal and subnormal numbers alike. Infinity and NaN (exponent all ones) keep their
// exponent instead.
GHOSTGRAD_HD float to_accumulation(Float16 value) {
#if defined(__CUDA_ARCH__)  // one instruction
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t finite = bits_from_float(float_from_bits(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return float_from_bits(sign | (magnitude >= 0x0f800000u ? special : finite));
#endif
}

// Rounds to nearest, ties to even, as PyTorch's casts do.
template <class T>
GHOSTGRAD_HD T from_accumulation(accumulation_t<T> value) {
  return value;
}
template <>
GHOSTGRAD_HD BFloat16 from_accumulation<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  BFloat16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
#else
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return BFloat16{static_cast<uint16_t>((bits >> 16) | 0x40u)};  // NaN stays NaN
  return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}
template <>
GHOSTGRAD_HD Float16 from_accumulation<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  Float16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal in half: adding 0.5 leaves exactly the bits of value / 2^-24, rounded by the adder itself, in the low
    // end of the mantissa.
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return Float16{static_cast<uint16_t>(sign | half)};
#endif
}

}  // namespace ghostgrad::core
