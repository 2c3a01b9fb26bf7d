// What the noise kernels share: the table of tensors that makes one launch of many, and noise for four elements at a
// time.
//
// A block owns one unit at a time, kUnit = 8192 indices of one parameter, aligned. Its threads take four adjacent
// elements each, eight times; neighbours take neighbours. For Rademacher noise, 64 threads make one call of Philox
// each, and the 1 KiB of signs goes through shared memory; for the others four elements are what a call gives.
#pragma once

#include "core/noise.h"
#include "core/sections.h"
#include "core/storage.h"
#include "cuda/device.cuh"

namespace ghostgrad::cuda {
namespace {

constexpr int64_t kUnit = 8192;
constexpr int kQuad = 4;

// A kernel's parameters hold 4 KiB, or 32 KiB since CUDA 12.1: no copy to the device, nothing to wait for, and a graph
// that captures the launch has captured the table.
constexpr int kFewTensors = 48;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kManyTensors = kFewTensors;
#else
constexpr int kManyTensors = 384;
#endif

// Tensors with kPointers pointers each, whose units are numbered through.
template <int kPointers, int kCapacity>
struct Table {
  int count;
  int64_t units;
  core::Section sections[kCapacity];
  void* pointers[kCapacity][kPointers];
};

// The section that a unit belongs to: the last one that begins at it or before. (Sections without units begin where the
// next one does.)
template <class T>
__device__ __forceinline__ int section_of(const T& table, int64_t unit) {
  int first = 0, last = table.count;
  while (last - first > 1) {
    const int middle = (first + last) / 2;
    if (table.sections[middle].first_unit <= unit) {
      first = middle;
    } else {
      last = middle;
    }
  }
  return first;
}

// Calls use(table, begin) for tables of at most kManyTensors of the tensors, the first of which is number `begin`:
// once, unless there are more.
template <int kPointers, class Use>
cudaError_t for_tables(const core::Section* sections, int64_t count, void* const (*pointers)[kPointers],
                       const Use& use) {
  const auto fill = [&](auto& table, int64_t begin, int64_t end) {
    table.count = static_cast<int>(end - begin);
    for (int64_t s = begin; s < end; ++s) {
      table.sections[s - begin] = sections[s];
      for (int p = 0; p < kPointers; ++p) table.pointers[s - begin][p] = pointers[s][p];
    }
    table.units = core::number_units(table.sections, table.count, kUnit);
    return table.units == 0 ? cudaSuccess : use(table, begin);
  };
  for (int64_t begin = 0; begin < count; begin += kManyTensors) {
    const int64_t end = core::minimum(count, begin + kManyTensors);
    if (end - begin <= kFewTensors) {
      Table<kPointers, kFewTensors> table;
      GHOSTGRAD_TRY(fill(table, begin, end));
    } else {
      Table<kPointers, kManyTensors> table;
      GHOSTGRAD_TRY(fill(table, begin, end));
    }
  }
  return cudaSuccess;
}

// Four elements, moved in one go where they are aligned.
template <class S>
struct alignas(sizeof(S) == 2 ? 8 : 16) Quad {
  S values[kQuad];
};
template <class S>
__device__ __forceinline__ bool is_aligned(const S* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Quad<S>) == 0;
}

// Elements [first, last) of the four from `from` on; the others are zero and not touched.
template <class S>
__device__ __forceinline__ Quad<S> load_quad(const S* from, int first, int last) {
  if (first <= 0 && last >= kQuad && is_aligned(from)) return *reinterpret_cast<const Quad<S>*>(from);
  Quad<S> quad{};
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (i >= first && i < last) quad.values[i] = from[i];
  }
  return quad;
}
template <class S>
__device__ __forceinline__ void store_quad(S* to, const Quad<S>& quad, int first, int last) {
  if (first <= 0 && last >= kQuad && is_aligned(to)) {
    *reinterpret_cast<Quad<S>*>(to) = quad;
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (i >= first && i < last) to[i] = quad.values[i];
  }
}

// Calls body(element, first, last, xi) for the quads of a unit that this thread owns: four elements of the tensor, of
// which [first, last) belong to the unit, and their noise. All threads of the block must call it.
template <class Body>
__device__ __forceinline__ void for_quads(const core::Noise& noise, const core::Section& section, int64_t unit,
                                          const Body& body) {
  __shared__ uint32_t signs[kUnit / 32];
  const core::Span span = core::span_of(section, unit, kUnit);
  const int64_t origin = span.begin / kUnit * kUnit;
  const bool rademacher = noise.distribution == core::Distribution::kRademacher;
  if (rademacher) {
    if (threadIdx.x < kUnit / 128) {
      const core::PhiloxBlock block = noise.block(section.number, static_cast<uint64_t>(origin / 128 + threadIdx.x));
      for (int i = 0; i < 4; ++i) signs[4 * threadIdx.x + i] = block.word[i];
    }
    __syncthreads();
  }
#pragma unroll 4
  for (int at = threadIdx.x * kQuad; at < kUnit; at += kThreads * kQuad) {
    const int64_t index = origin + at;
    if (index + kQuad <= span.begin || index >= span.end) continue;
    const int first = static_cast<int>(core::maximum(span.begin - index, 0));
    const int last = static_cast<int>(core::minimum(span.end - index, kQuad));
    float xi[kQuad];
    if (rademacher) {
      const uint32_t bits = signs[at / 32] >> (at % 32);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) xi[i] = core::rademacher(bits >> i & 1u);
    } else {
      core::draw_four(noise.distribution, noise.block(section.number, static_cast<uint64_t>(index / kQuad)), xi);
    }
    body(span.local + index - span.begin, first, last, xi);
  }
  if (rademacher) __syncthreads();  // nobody overwrites the signs before all have used them
}

}  // namespace
}  // namespace ghostgrad::cuda
