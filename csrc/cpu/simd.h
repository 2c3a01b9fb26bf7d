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
#error "kernel files are compiled per instruction set: define GHOSTGRAD_ISA (portable, avx2, avx512 or avx512bf16)"
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

// What a lane of a product multiplies at a time: one element, widened to the type that it is summed in; or a pair of
// bfloat16, where the machine has an instruction that adds both products to a float32. Vectors of pairs are typed as
// those of float and mean nothing outside of multiply_add.
template <class S>
struct FactorOf {
  using type = core::accumulation_t<S>;
  static constexpr int kElements = 1;
};
#if defined(__AVX512BF16__)
struct BFloat16Pair {
  uint32_t bits;
};
template <>
struct FactorOf<core::BFloat16> {
  using type = BFloat16Pair;
  static constexpr int kElements = 2;
};
#endif
template <class S>
using Factor = typename FactorOf<S>::type;
template <class S>
constexpr int kElements = FactorOf<S>::kElements;

// The factor that begins with *first; *second, if there is one, completes a pair.
template <class S>
GHOSTGRAD_HD Factor<S> factor(const S* first, [[maybe_unused]] const S* second) {
#if defined(__AVX512BF16__)
  if constexpr (kElements<S> == 2) {
    return BFloat16Pair{first->bits | (second == nullptr ? 0u : static_cast<uint32_t>(second->bits) << 16)};
  } else
#endif
    return core::to_accumulation(*first);
}

// A vector of factors of kLanes * kElements adjacent elements, or of the first `count` of them, fewer than all, and
// zeros.
template <class S>
GHOSTGRAD_HD Vector<core::accumulation_t<S>> load_factors(const S* from) {
  if constexpr (kElements<S> == 2) {
    Vector<core::accumulation_t<S>> v;
    memcpy(&v, from, sizeof(v));
    return v;
  } else {
    return load(from);
  }
}
template <class S>
GHOSTGRAD_HD Vector<core::accumulation_t<S>> load_factors(const S* from, int64_t count) {
  alignas(kVectorBytes) S part[kVectorBytes / sizeof(S)] = {};
#if defined(__AVX512F__)
  const uint32_t mask = (1u << (static_cast<uint32_t>(count) * (sizeof(S) / 2))) - 1;
  _mm512_store_si512(part, _mm512_maskz_loadu_epi16(mask, from));
#else
#if defined(__AVX2__)
  if constexpr (sizeof(S) >= 4) {
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count * (sizeof(S) / 4))), places);
    const __m256i loaded = _mm256_maskload_epi32(reinterpret_cast<const int*>(from), mask);
    _mm256_store_si256(reinterpret_cast<__m256i*>(part), loaded);
    return load_factors(static_cast<const S*>(part));
  }
#endif
  for (int64_t i = 0; i < count; ++i) part[i] = from[i];
#endif
  return load_factors(static_cast<const S*>(part));
}

// sum + x * y lane by lane, where y may be a single factor.
template <class S, class A = core::accumulation_t<S>>
GHOSTGRAD_HD Vector<A> multiply_add(Vector<A> sum, Vector<A> x, Vector<A> y) {
#if defined(__AVX512BF16__)
  if constexpr (kElements<S> == 2) {
    return reinterpret_cast<Vector<A>>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y)));
  } else
#endif
    return sum + x * y;
}
template <class S, class A = core::accumulation_t<S>>
GHOSTGRAD_HD Vector<A> multiply_add(Vector<A> sum, Vector<A> x, Factor<S> y) {
#if defined(__AVX512BF16__)
  if constexpr (kElements<S> == 2) {
    return multiply_add<S>(sum, x, reinterpret_cast<Vector<A>>(y.bits + BitsVector{}));
  } else
#endif
    return sum + x * y;
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

// Blocks of kStep lanes exchanged between two rows that are kStep apart: upper right for lower left.
template <class A, int kStep>
GHOSTGRAD_HD void exchange(Vector<A>& upper, Vector<A>& lower) {
  const Vector<A> first = upper, second = lower;
#if defined(__clang__)
  for (int j = 0; j < kLanes<A>; ++j) {
    upper[j] = j & kStep ? second[j - kStep] : first[j];
    lower[j] = j & kStep ? second[j] : first[j + kStep];
  }
#else
  Index<A> to_upper, to_lower;
#pragma GCC unroll 16
  for (int j = 0; j < kLanes<A>; ++j) {
    to_upper[j] = j & kStep ? kLanes<A> + j - kStep : j;
    to_lower[j] = j & kStep ? kLanes<A> + j : j + kStep;
  }
  upper = __builtin_shuffle(first, second, to_upper);
  lower = __builtin_shuffle(first, second, to_lower);
#endif
}

// rows[i][j] and rows[j][i] exchanged, by exchanging ever smaller blocks off the diagonal.
template <class A, int kStep>
GHOSTGRAD_HD void transpose_step(Vector<A> (&rows)[kLanes<A>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<A>; ++i) {
    if (!(i & kStep)) exchange<A, kStep>(rows[i], rows[i + kStep]);
  }
  if constexpr (kStep > 1) transpose_step<A, kStep / 2>(rows);
}
template <class A>
GHOSTGRAD_HD void transpose(Vector<A> (&rows)[kLanes<A>]) {
  transpose_step<A, kLanes<A> / 2>(rows);
}

// The sums of the lanes of as many rows as there are lanes: they are transposed and added, each step adding as soon as
// it has exchanged. The rows are lost.
template <class A, int kStep = kLanes<A> / 2>
GHOSTGRAD_HD Vector<A> sums_of_lanes(Vector<A> (&rows)[kLanes<A>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kStep; ++i) {
    exchange<A, kStep>(rows[i], rows[i + kStep]);
    rows[i] += rows[i + kStep];
  }
  if constexpr (kStep > 1) {
    return sums_of_lanes<A, kStep / 2>(rows);
  } else {
    return rows[0];
  }
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
