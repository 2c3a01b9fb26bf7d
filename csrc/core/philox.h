// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a bijection of
// 128 bits, the counter, for every key of 64 bits. It has no state: block n of a stream is a function of n alone.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace ghostgrad::core {

// The multipliers of the two halves of a round, and what is added to the halves of the key from round to round.
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxKey {
  uint32_t low, high;
};
struct PhiloxBlock {
  uint32_t word[4];
};

GHOSTGRAD_HD constexpr PhiloxBlock philox(PhiloxBlock counter, PhiloxKey key) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * c0, product1 = uint64_t{kPhiloxMultiplier1} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key.low;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key.high;
    c3 = static_cast<uint32_t>(product0);
    key.low += kPhiloxWeyl0;
    key.high += kPhiloxWeyl1;
  }
  return PhiloxBlock{{c0, c1, c2, c3}};
}

}  // namespace ghostgrad::core
