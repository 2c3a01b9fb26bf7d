// Philox against the vectors that its authors publish (kat_vectors of Random123), and the address of noise: which bits
// of which call are whose.
#include "core/philox.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>

#include "core/noise.h"
#include "expect.h"

using namespace ghostgrad::core;

constexpr PhiloxBlock kZeros = philox(PhiloxBlock{{0, 0, 0, 0}}, PhiloxKey{0, 0});
static_assert(kZeros.word[0] == 0x6627e8d5u && kZeros.word[1] == 0xe169c58du && kZeros.word[2] == 0xbc57ac4cu &&
                  kZeros.word[3] == 0x9b00dbd8u,
              "a constant expression");

static void test_known_answers() {
  const struct {
    PhiloxBlock counter;
    PhiloxKey key;
    PhiloxBlock answer;
  } cases[] = {{{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
               {{{~0u, ~0u, ~0u, ~0u}}, {~0u, ~0u}, {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}},
               {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
                {0xa4093822u, 0x299f31d0u},
                {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}}};
  for (const auto& c : cases) {
    const PhiloxBlock got = philox(c.counter, c.key);
    for (int i = 0; i < 4; ++i) EXPECT(got.word[i] == c.answer.word[i], "word %d: %08x", i, got.word[i]);
  }
}

static void test_address() {
  const Noise noise{0x299f31d0a4093822u, Distribution::kRademacher};
  const PhiloxBlock got = noise.block(7, 0x85a308d3243f6a88u);
  const PhiloxBlock expected =
      philox(PhiloxBlock{{0x243f6a88u, 0x85a308d3u, 7, 0}}, PhiloxKey{0xa4093822u, 0x299f31d0u});
  for (int i = 0; i < 4; ++i) EXPECT(got.word[i] == expected.word[i]);
  EXPECT(block_elements(Distribution::kRademacher) == 128);
  EXPECT(block_elements(Distribution::kNormal) == 4 && block_elements(Distribution::kUniform) == 4);
  EXPECT(rademacher(0) == 1.0f && rademacher(1) == -1.0f);
}

// The ends of both ranges, and words in between: within 5 units in the last place of the definition in double, or of
// 1/8 where the definition is less.
static void test_transforms() {
  const double pi = 3.14159265358979323846;
  double worst = 0.0;
  const auto near = [&](float got, double truth) {
    const double unit = std::fmax(std::ldexp(1.0, std::ilogb(std::fabs(truth) + 1e-300) - 23), 0x1p-26);
    const double error = std::fabs(static_cast<double>(got) - truth) / unit;
    worst = std::fmax(worst, error);
    return error <= 5.0;
  };
  uint64_t state = 1;
  for (int k = 0; k < 4000000; ++k) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    uint32_t first = static_cast<uint32_t>(state >> 32), second = static_cast<uint32_t>(state >> 11) * 2654435761u;
    if (k < 64) first = k < 32 ? 1u << k : ~0u << (k - 32);               // all magnitudes of u, from both ends
    if (k >= 64 && k < 96) second = static_cast<uint32_t>(k - 64) << 27;  // eighths of a turn, where quadrants change
    float x, y;
    normal_pair<Lane>(first, second, x, y);
    // fl(fl(w / 2) + 1/2): the definition, as float32 has it
    const double u = static_cast<double>(static_cast<float>(first >> 1) + 0.5f) * 0x1p-31;
    const double r = std::sqrt(-2.0 * std::log(u)), angle = 2 * pi * 0x1p-32 * second;
    EXPECT(near(x, r * std::cos(angle)), "cosine of %08x %08x: %.9g, not %.9g", first, second, double(x),
           r * std::cos(angle));
    EXPECT(near(y, r * std::sin(angle)), "sine of %08x %08x: %.9g, not %.9g", first, second, double(y),
           r * std::sin(angle));
    EXPECT(uniform<Lane>(first) == static_cast<float>((first >> 8) * 0x1p-24 + 0x1p-25 - 0.5), "uniform of %08x",
           first);
    if (failures > 20) return;
  }
  std::printf("normal: largest error %.2f units in the last place\n", worst);
  EXPECT(uniform<Lane>(0) == -0.5f + 0x1p-25f && uniform<Lane>(~0u) == 0.5f - 0x1p-25f);
}

int main() {
  test_known_answers();
  test_address();
  test_transforms();
  return failures;
}
