// Tensors as parts of full parameters, and what the noise ops make of them element by element: for the tests of the CPU
// kernels and of the emulated CUDA kernels.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "core/noise.h"
#include "core/nso.h"
#include "core/sections.h"
#include "dtypes.h"

namespace noise_cases {

using namespace ghostgrad;

constexpr core::Distribution kDistributions[] = {core::Distribution::kRademacher, core::Distribution::kNormal,
                                                 core::Distribution::kUniform};

inline core::Section whole(int64_t elements, uint32_t number) {
  return core::Section{elements, number, 0, 0, elements, elements, 0};
}

// Whole parameters of all awkward sizes, shards that begin and end anywhere, columns of a matrix, an index beyond 2^32.
inline std::vector<core::Section> sections() {
  std::vector<core::Section> all;
  uint32_t number = 0;
  for (int64_t elements : {0, 1, 3, 4, 127, 128, 129, 2047, 2048, 2049, 8191, 8193, 32768, 40001, 70000}) {
    all.push_back(whole(elements, number++));
  }
  for (int64_t offset : {1, 5, 130, 2000, 8190, 32767}) all.push_back({3001, number, 0, offset, 3001, 3001, 0});
  all.push_back({300, number, 0, 10, 3, 7, 0});
  all.push_back({9000, number, 0, 4096, 4500, 8200, 0});
  all.push_back({70000, number, 0, 123, 35000, 40000, 0});
  all.push_back({600, 0xffffffffu, 0, (int64_t{1} << 40) + 77, 600, 600, 0});
  for (size_t s = 0; s < all.size(); ++s) all[s].slot = static_cast<int32_t>(s);
  return all;
}

inline int64_t index_of(const core::Section& section, int64_t element) {
  return section.offset + element / section.run * section.pitch + element % section.run;
}

// The definition, an element at a time.
inline float xi(const core::Noise& noise, const core::Section& section, int64_t element) {
  const int64_t index = index_of(section, element), per_block = core::block_elements(noise.distribution);
  const core::PhiloxBlock block = noise.block(section.number, static_cast<uint64_t>(index / per_block));
  const int64_t place = index % per_block;
  if (noise.distribution == core::Distribution::kRademacher) {
    return core::rademacher(block.word[place / 32] >> (place % 32) & 1u);
  }
  float four[4];
  core::draw_four(noise.distribution, block, four);
  return four[place];
}

template <class S>
std::vector<std::vector<S>> tensors(const std::vector<core::Section>& sections, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<std::vector<S>> all;
  for (const core::Section& section : sections) {
    all.emplace_back(static_cast<size_t>(section.elements));
    for (S& value : all.back()) {
      value = core::from_accumulation<S>(static_cast<core::accumulation_t<S>>(uniform(generator)));
    }
  }
  return all;
}

template <class S>
std::vector<void*> pointers(std::vector<std::vector<S>>& tensors) {
  std::vector<void*> all;
  for (auto& tensor : tensors) all.push_back(tensor.data());
  return all;
}

}  // namespace noise_cases
