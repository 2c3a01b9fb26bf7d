// Vectors of the instruction set that the including file is compiled for.
//
// Note [One translation unit per instruction set]
// CMake compiles every kernel file of this folder once per instruction set, with GHOSTGRAD_ISA naming the set and its
// namespace; dispatch.cpp picks one at run time. So one library runs on any x86-64 and still uses what the machine has.
// The danger of the scheme is the linker: an inline function with an out-of-line copy exists in several objects, the
// linker keeps any one of them, and if that one holds AVX-512 code an older machine meets an illegal instruction in a
// place that looks portable. Hence kernel files use no function of the standard library's templates, keep what is
// theirs in an unnamed namespace, and share only forced-inline code. tests/kernels/test_objects.py looks for weak
// symbols in these objects.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "core/dtype.h"
#include "core/macros.h"

#ifndef GHOSTGRAD_ISA
#error "kernel files are compiled per instruction set: define GHOSTGRAD_ISA (portable, avx2 or avx512)"
#endif

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

// kMr x (kNv vectors) is the block of sums that stays in registers while the product runs along its inner dimension.
// AVX-512 has 32 vector registers (12 x 2 sums, 2 operands, 1 broadcast), AVX2 and SSE have 16 (6 x 2, 2, 1).
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kMr = 12, kNv = 2, kDotRows = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kMr = 6, kNv = 2, kDotRows = 3;
#else
constexpr int kVectorBytes = 16, kMr = 6, kNv = 2, kDotRows = 3;
#endif

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class A>
GHOSTGRAD_HD Vector<A> load_aligned(const A* from) {
  return *reinterpret_cast<const Vector<A>*>(from);
}

// kLanes elements of storage type S, widened to the type they are accumulated in; no alignment asked.
GHOSTGRAD_HD Vector<float> load(const float* from) {
  Vector<float> v;
  memcpy(&v, from, sizeof(v));
  return v;
}
GHOSTGRAD_HD Vector<double> load(const double* from) {
  Vector<double> v;
  memcpy(&v, from, sizeof(v));
  return v;
}
template <class A>
GHOSTGRAD_HD void store(A* to, Vector<A> v) {
  memcpy(to, &v, sizeof(v));
}
// 16 bits are widened by vector arithmetic that mirrors core::to_accumulation, with the machine's own instructions
// where there are some: left to itself, gcc 12 takes four times as long for either step.
typedef uint16_t ShortVector __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t BitsVector __attribute__((vector_size(kVectorBytes)));
GHOSTGRAD_HD BitsVector load_widened(const void* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<BitsVector>(
      _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<BitsVector>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#else
  ShortVector narrow;
  memcpy(&narrow, from, sizeof(narrow));
  return __builtin_convertvector(narrow, BitsVector);
#endif
}
GHOSTGRAD_HD Vector<float> load(const core::BFloat16* from) {
  return reinterpret_cast<Vector<float>>(load_widened(from) << 16);
}
GHOSTGRAD_HD Vector<float> load(const core::Float16* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<float>>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  return reinterpret_cast<Vector<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  const BitsVector bits = load_widened(from);
  const BitsVector sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  const BitsVector finite = reinterpret_cast<BitsVector>(reinterpret_cast<Vector<float>>(magnitude) * 0x1p112f);
  const BitsVector special = magnitude | 0x7f800000u;
  return reinterpret_cast<Vector<float>>(sign | (magnitude >= 0x0f800000u ? special : finite));
#endif
}

// The same back, rounded as core::from_accumulation rounds.
GHOSTGRAD_HD void store(core::BFloat16* to, Vector<float> v) {
  const BitsVector bits = reinterpret_cast<BitsVector>(v);
  const BitsVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const BitsVector chosen = (bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded;  // NaN stays NaN
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(chosen)));
#else
  const ShortVector narrow = __builtin_convertvector(chosen, ShortVector);
  memcpy(to, &narrow, sizeof(narrow));
#endif
}
GHOSTGRAD_HD void store(core::Float16* to, Vector<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) to[lane] = core::from_accumulation<core::Float16>(v[lane]);
#endif
}

// An integer for every lane: to select lanes, and to mask them.
template <class A>
struct IndexOf {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct IndexOf<double> {
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Index = typename IndexOf<A>::type;

// rows[i][j] and rows[j][i] exchanged, by exchanging ever smaller blocks off the diagonal.
template <class A, int kStep>
GHOSTGRAD_HD void transpose_step(Vector<A> (&rows)[kLanes<A>]) {
  Index<A> upper, lower;
#pragma GCC unroll 16
  for (int j = 0; j < kLanes<A>; ++j) {
    upper[j] = j & kStep ? kLanes<A> + j - kStep : j;
    lower[j] = j & kStep ? kLanes<A> + j : j + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<A>; ++i) {
    if (i & kStep) continue;
    const Vector<A> first = rows[i], second = rows[i + kStep];
#if defined(__clang__)
    for (int j = 0; j < kLanes<A>; ++j) {
      rows[i][j] = j & kStep ? second[j - kStep] : first[j];
      rows[i + kStep][j] = j & kStep ? second[j] : first[j + kStep];
    }
#else
    rows[i] = __builtin_shuffle(first, second, upper);
    rows[i + kStep] = __builtin_shuffle(first, second, lower);
#endif
  }
  if constexpr (kStep > 1) transpose_step<A, kStep / 2>(rows);
}
template <class A>
GHOSTGRAD_HD void transpose(Vector<A> (&rows)[kLanes<A>]) {
  transpose_step<A, kLanes<A> / 2>(rows);
}

// The lanes of `v` added by halves: upper onto lower, until one is left.
template <class A, int kWidth>
struct Narrow {
  typedef A type __attribute__((vector_size(kWidth * sizeof(A))));
};
template <class A, int kWidth>
GHOSTGRAD_HD A sum_of_lanes(typename Narrow<A, kWidth>::type v) {
  if constexpr (kWidth == 2) {
    return v[0] + v[1];
  } else {
    typename Narrow<A, kWidth / 2>::type half[2];
    memcpy(&half, &v, sizeof(v));
    return sum_of_lanes<A, kWidth / 2>(half[0] + half[1]);
  }
}
template <class A>
GHOSTGRAD_HD A horizontal_sum(Vector<A> v) {
  return sum_of_lanes<A, kLanes<A>>(v);
}

}  // namespace
}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
