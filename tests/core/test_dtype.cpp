// Conversions between 16 bits and float, over every value there is.
#include <cmath>

#include "core/dtype.h"
#include "expect.h"

using namespace ghostgrad::core;

// The value of a half by its definition.
static float half_by_definition(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const float sign = (bits >> 15) != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

static bool same(float x, float y) {
  return (std::isnan(x) && std::isnan(y)) || bits_from_float(x) == bits_from_float(y);
}

int main() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Float16 half{static_cast<uint16_t>(bits)};
    const float value = to_accumulation(half);
    EXPECT(same(value, half_by_definition(half.bits)), "half %04x", bits);
    EXPECT(same(to_accumulation(from_accumulation<Float16>(value)), value), "half %04x and back", bits);
    const BFloat16 brain{static_cast<uint16_t>(bits)};
    EXPECT(same(to_accumulation(from_accumulation<BFloat16>(to_accumulation(brain))), to_accumulation(brain)),
           "bfloat16 %04x and back", bits);
  }
  // Between two neighbours, the nearer one; half way, the even one.
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const float low = half_by_definition(static_cast<uint16_t>(bits)),
                high = half_by_definition(static_cast<uint16_t>(bits + 1));
    const float middle = low + (high - low) / 2;
    const uint16_t even = static_cast<uint16_t>(bits + (bits & 1));
    EXPECT(from_accumulation<Float16>(middle).bits == even, "half way above %04x", bits);
    EXPECT(from_accumulation<Float16>(std::nextafter(middle, low)).bits == bits, "below half way above %04x", bits);
    EXPECT(from_accumulation<Float16>(std::nextafter(middle, high)).bits == bits + 1, "above half way above %04x",
           bits);
    EXPECT(from_accumulation<Float16>(-middle).bits == (even | 0x8000), "half way below -%04x", bits);
  }
  EXPECT(from_accumulation<Float16>(65519.0f).bits == 0x7bff);
  EXPECT(from_accumulation<Float16>(65520.0f).bits == 0x7c00);
  EXPECT(from_accumulation<Float16>(1e30f).bits == 0x7c00);
  for (uint32_t bits = 0; bits < 0x7f7f; ++bits) {
    const uint32_t middle = (bits << 16) | 0x8000u;
    const uint16_t even = static_cast<uint16_t>(bits + (bits & 1));
    EXPECT(from_accumulation<BFloat16>(float_from_bits(middle)).bits == even, "half way above %04x", bits);
    EXPECT(from_accumulation<BFloat16>(float_from_bits(middle - 1)).bits == bits, "below half way above %04x", bits);
    EXPECT(from_accumulation<BFloat16>(float_from_bits(middle + 1)).bits == bits + 1, "above half way above %04x",
           bits);
  }
  EXPECT(std::isnan(to_accumulation(from_accumulation<BFloat16>(float_from_bits(0x7f800001u)))),
         "a NaN whose mantissa is cut off");
  return failures;
}
