// Tensors as parts of full parameters, and how their elements are cut into units of work.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/tiles.h"

namespace ghostgrad::core {

// A tensor that is all or a part (a shard) of the parameter of this number. Its element i, row by row, has the index
// offset + i / run * pitch + i % run in the full parameter: runs of adjacent elements, `pitch` apart.
struct Section {
  int64_t elements;
  uint32_t number;
  int32_t slot;                // where results of this tensor go
  int64_t offset, run, pitch;  // elements is a multiple of run
  int64_t first_unit;          // of all sections' units, in order
};

// A range of indices in the full parameter, and where it begins in the tensor.
struct Span {
  int64_t begin, end;
  int64_t local;
};

// A unit is what one run has of one stretch of `size` indices, `size` aligned: so a unit's borders do not split the
// blocks of 128 bits that noise comes in. A run may touch one stretch more than it fills; some of the last are empty.
GHOSTGRAD_HD constexpr int64_t run_units(const Section& section, int64_t size) {
  const bool one = section.run == section.elements;  // then it is known where it begins
  return one ? ceil_div(section.offset % size + section.run, size) : ceil_div(section.run + size - 1, size);
}
GHOSTGRAD_HD constexpr int64_t units(const Section& section, int64_t size) {
  return section.elements == 0 ? 0 : section.elements / section.run * run_units(section, size);
}
GHOSTGRAD_HD constexpr Span span_of(const Section& section, int64_t unit, int64_t size) {
  const int64_t per_run = run_units(section, size), run = unit / per_run;
  const int64_t first = section.offset + run * section.pitch, stretch = first / size + unit % per_run;
  const int64_t begin = maximum(first, stretch * size), end = minimum(first + section.run, (stretch + 1) * size);
  return Span{begin, maximum(begin, end), run * section.run + begin - first};
}

// Numbers the units of all sections through and returns how many there are.
GHOSTGRAD_HD int64_t number_units(Section* sections, int64_t count, int64_t size) {
  int64_t all = 0;
  for (int64_t s = 0; s < count; ++s) {
    sections[s].first_unit = all;
    all += units(sections[s], size);
  }
  return all;
}

}  // namespace ghostgrad::core
