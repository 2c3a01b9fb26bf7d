// The noise of Note [The address of noise] in csrc/core/noise.h by vectors: the same bits.
#pragma once

#if defined(__SSE2__) && !defined(__F16C__)
#include <emmintrin.h>
#endif

#include "core/noise.h"
#include "core/sections.h"
#include "cpu/simd.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

constexpr int64_t kUnit = 1 << 15;    // indices in a unit of work
constexpr int64_t kNoiseTile = 2048;  // indices whose noise is drawn before it is used: 8 KiB, which stay in the cache

// Vectors that are computed with side by side: one alone is a single long chain of operations, which would leave the
// machine waiting for results. Four take a fifth less time than two, although AVX2 has registers for two only.
constexpr int kChains = 4;
template <class V, int kCount>
struct Group {
  V v[kCount];
};
template <class V, int kCount, class Operation>
GHOSTGRAD_HD Group<V, kCount> each(const Operation& operation) {
  Group<V, kCount> result;
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) result.v[i] = operation(i);
  return result;
}
#define GHOSTGRAD_GROUPED(OPERATOR)                                                                       \
  template <class V, int kCount>                                                                          \
  GHOSTGRAD_HD Group<V, kCount> operator OPERATOR(const Group<V, kCount>& x, const Group<V, kCount>& y) { \
    return each<V, kCount>([&](int i) { return x.v[i] OPERATOR y.v[i]; });                                \
  }                                                                                                       \
  template <class V, int kCount, class Scalar>                                                            \
  GHOSTGRAD_HD Group<V, kCount> operator OPERATOR(const Group<V, kCount>& x, Scalar y) {                  \
    return each<V, kCount>([&](int i) { return x.v[i] OPERATOR y; });                                     \
  }
GHOSTGRAD_GROUPED(+)
GHOSTGRAD_GROUPED(-)
GHOSTGRAD_GROUPED(*)
GHOSTGRAD_GROUPED(&)
GHOSTGRAD_GROUPED(|)
GHOSTGRAD_GROUPED(^)
GHOSTGRAD_GROUPED(<<)
GHOSTGRAD_GROUPED(>>)
#undef GHOSTGRAD_GROUPED

GHOSTGRAD_HD Vector<float> root(Vector<float> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(x);
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}

// core::Lane on groups of vectors.
struct Lanes {
  using Real = Group<Vector<float>, kChains>;
  using Bits = Group<BitsVector, kChains>;
  using Integer = Group<Index<float>, kChains>;

  template <class To, class From>
  static GHOSTGRAD_HD Group<To, kChains> reinterpret(const From& from) {
    return each<To, kChains>([&](int i) { return reinterpret_cast<To>(from.v[i]); });
  }
  static GHOSTGRAD_HD Real add(Real x, Real y) { return x + y; }
  static GHOSTGRAD_HD Real multiply(Real x, Real y) { return x * y; }
  static GHOSTGRAD_HD Real root(Real x) {
    return each<Vector<float>, kChains>([&](int i) { return GHOSTGRAD_ISA::root(x.v[i]); });
  }
  static GHOSTGRAD_HD Real constant(float value) {
    return each<Vector<float>, kChains>([&](int) { return value - Vector<float>{}; });
  }
  static GHOSTGRAD_HD Real real(Integer value) {
    return each<Vector<float>, kChains>([&](int i) { return __builtin_convertvector(value.v[i], Vector<float>); });
  }
  static GHOSTGRAD_HD Real from_bits(Bits bits) { return reinterpret<Vector<float>>(bits); }
  static GHOSTGRAD_HD Bits bits(Real value) { return reinterpret<BitsVector>(value); }
  static GHOSTGRAD_HD Integer integer(Bits bits) { return reinterpret<Index<float>>(bits); }
  static GHOSTGRAD_HD Bits bits_of(Integer value) { return reinterpret<BitsVector>(value); }
  static GHOSTGRAD_HD Bits choose(Bits odd, Bits yes, Bits no) {
    return each<BitsVector, kChains>([&](int i) { return odd.v[i] != 0 ? yes.v[i] : no.v[i]; });
  }
};

// x0 y0 x1 y1 of every four lanes, and x2 y2 x3 y3.
struct Interleaved {
  BitsVector first, second;
};
GHOSTGRAD_HD Interleaved interleave(BitsVector x, BitsVector y) {
  Interleaved to;
#if defined(__clang__)
  for (int j = 0; j < kLanes<float>; ++j) {
    to.first[j] = (j % 2 ? y : x)[j / 4 * 4 + j % 4 / 2];
    to.second[j] = (j % 2 ? y : x)[j / 4 * 4 + j % 4 / 2 + 2];
  }
#else
  Index<float> first, second;
#pragma GCC unroll 16
  for (int j = 0; j < kLanes<float>; ++j) {
    first[j] = j / 4 * 4 + j % 4 / 2 + j % 2 * kLanes<float>;
    second[j] = first[j] + 2;
  }
  to.first = __builtin_shuffle(x, y, first);
  to.second = __builtin_shuffle(x, y, second);
#endif
  return to;
}

// 64 bits for every block that is drawn at a time; the upper half of a lane that holds a word of 32 means nothing.
typedef uint64_t LongVector __attribute__((vector_size(kVectorBytes)));
constexpr int kBlocks = kVectorBytes / 8;

GHOSTGRAD_HD LongVector product_of_halves(LongVector x, uint32_t factor) {  // of the lower halves
#if defined(__AVX512F__)
  return reinterpret_cast<LongVector>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(x), _mm512_set1_epi64(static_cast<int64_t>(factor))));
#elif defined(__AVX2__)
  return reinterpret_cast<LongVector>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(x), _mm256_set1_epi64x(static_cast<int64_t>(factor))));
#elif defined(__SSE2__)
  return reinterpret_cast<LongVector>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(x), _mm_set1_epi64x(static_cast<int64_t>(factor))));
#else
  return (x & 0xffffffffu) * uint64_t{factor};
#endif
}

template <int kCount>
GHOSTGRAD_HD Group<LongVector, kCount> product_of_halves(const Group<LongVector, kCount>& x, uint32_t factor) {
  return each<LongVector, kCount>([&](int i) { return product_of_halves(x.v[i], factor); });
}

// core::philox for the kBlocks blocks from `block` on, and for as many after them, and so on. Lanes hold blocks 0,
// n / 2, 1, n / 2 + 1, ... of n, because that is the order from which interleave() makes ascending ones. Words 0 and 2
// of a block are adjacent lanes of `even`, words 1 and 3 of `odd`.
template <int kCount>
GHOSTGRAD_HD void philox(const core::Noise& noise, uint32_t number, uint64_t block, Group<BitsVector, kCount>& even,
                         Group<BitsVector, kCount>& odd) {
  using Words = Group<LongVector, kCount>;
  LongVector lanes;
#pragma GCC unroll 8
  for (int lane = 0; lane < kBlocks; ++lane) lanes[lane] = static_cast<uint64_t>(lane % 2 * (kBlocks / 2) + lane / 2);
  Words c0 = each<LongVector, kCount>([&](int i) { return lanes + (block + static_cast<uint64_t>(i * kBlocks)); });
  Words c1 = c0 >> 32;
  Words c2 = each<LongVector, kCount>([&](int) { return uint64_t{number} + LongVector{}; });
  Words c3 = each<LongVector, kCount>([&](int) { return static_cast<uint64_t>(noise.distribution) + LongVector{}; });
  core::PhiloxKey key = noise.key();
#pragma GCC unroll 10
  for (int round = 0; round < core::kPhiloxRounds; ++round) {
    const Words product0 = product_of_halves(c0, core::kPhiloxMultiplier0);
    const Words product1 = product_of_halves(c2, core::kPhiloxMultiplier1);
    c0 = (product1 >> 32) ^ c1 ^ uint64_t{key.low};
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ uint64_t{key.high};
    c3 = product0;
    key.low += core::kPhiloxWeyl0;
    key.high += core::kPhiloxWeyl1;
  }
  const Words of_even = (c0 & 0xffffffffu) | (c2 << 32), of_odd = (c1 & 0xffffffffu) | (c3 << 32);
  even = each<BitsVector, kCount>([&](int i) { return reinterpret_cast<BitsVector>(of_even.v[i]); });
  odd = each<BitsVector, kCount>([&](int i) { return reinterpret_cast<BitsVector>(of_odd.v[i]); });
}

// xi[i] for the elements i of [begin, end), counted from the tile's first. Whole batches are drawn: what stands around
// these elements is overwritten.
GHOSTGRAD_HD void draw_rademacher(const core::Noise& noise, uint32_t number, int64_t tile, int64_t begin, int64_t end,
                                  float* xi) {
  constexpr int64_t kBatch = 128 * 2 * kBlocks;
  static_assert(kNoiseTile % kBatch == 0, "a batch does not leave its tile");
  BitsVector select[32 / kLanes<float>];
#pragma GCC unroll 8
  for (int v = 0; v < 32 / kLanes<float>; ++v) {
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes<float>; ++lane) select[v][lane] = 1u << (v * kLanes<float> + lane);
  }
  for (int64_t i = begin / kBatch * kBatch; i < end; i += kBatch) {
    Group<BitsVector, 2> even, odd;
    philox(noise, number, static_cast<uint64_t>((tile * kNoiseTile + i) / 128), even, odd);
    const Interleaved words[2] = {interleave(even.v[0], odd.v[0]), interleave(even.v[1], odd.v[1])};
    uint32_t word[4 * 2 * kBlocks];
    memcpy(word, &words, sizeof(words));
    for (int64_t k = 0; k < 4 * 2 * kBlocks; ++k) {
#pragma GCC unroll 8
      for (int v = 0; v < 32 / kLanes<float>; ++v) {
        const BitsVector one = 0x3f800000u + BitsVector{}, minus_one = 0xbf800000u + BitsVector{};
        const BitsVector bits = word[k] + BitsVector{};
        store(xi + i + 32 * k + v * kLanes<float>,
              reinterpret_cast<Vector<float>>((bits & select[v]) != 0 ? minus_one : one));
      }
    }
  }
}
template <core::Distribution kDistribution>
GHOSTGRAD_HD void draw_from_words(const core::Noise& noise, uint32_t number, int64_t tile, int64_t begin, int64_t end,
                                  float* xi) {
  constexpr int64_t kBatch = 4 * kChains * kBlocks;
  static_assert(kNoiseTile % kBatch == 0, "a batch does not leave its tile");
  for (int64_t i = begin / kBatch * kBatch; i < end; i += kBatch) {
    Lanes::Bits even, odd;
    philox(noise, number, static_cast<uint64_t>((tile * kNoiseTile + i) / 4), even, odd);
    Lanes::Real x, y;
    if constexpr (kDistribution == core::Distribution::kNormal) {
      core::normal_pair<Lanes>(even, odd, x, y);
    } else {
      x = core::uniform<Lanes>(even);
      y = core::uniform<Lanes>(odd);
    }
    const Lanes::Bits of_x = Lanes::bits(x), of_y = Lanes::bits(y);
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const Interleaved in_order = interleave(of_x.v[chain], of_y.v[chain]);
      memcpy(xi + i + chain * 2 * kLanes<float>, &in_order, sizeof(in_order));
    }
  }
}

// Calls body(i, count, xi) for pieces of the unit's span: `count` elements from the tensor's element i on, whose noise
// is xi[0], xi[1], ... No piece crosses a multiple of kNoiseTile of indices in the full parameter.
template <class Body>
GHOSTGRAD_HD void for_noise(const core::Noise& noise, const core::Section& section, int64_t unit, const Body& body) {
  const core::Span span = core::span_of(section, unit, kUnit);
  alignas(kVectorBytes) float xi[kNoiseTile];
  for (int64_t at = span.begin; at < span.end;) {
    const int64_t tile = at / kNoiseTile, begin = at - tile * kNoiseTile;
    const int64_t end = core::minimum(kNoiseTile, span.end - tile * kNoiseTile);
    switch (noise.distribution) {
      case core::Distribution::kRademacher:
        draw_rademacher(noise, section.number, tile, begin, end, xi);
        break;
      case core::Distribution::kNormal:
        draw_from_words<core::Distribution::kNormal>(noise, section.number, tile, begin, end, xi);
        break;
      case core::Distribution::kUniform:
        draw_from_words<core::Distribution::kUniform>(noise, section.number, tile, begin, end, xi);
        break;
    }
    body(span.local + at - span.begin, end - begin, static_cast<const float*>(xi + begin));
    at += end - begin;
  }
}

// Calls body(s, unit) for the units [begin, end) of all sections: the section's place and the unit's within it.
template <class Body>
GHOSTGRAD_HD void for_units(const core::Section* sections, int64_t begin, int64_t end, const Body& body) {
  int64_t s = 0, last = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    while (unit >= (last = sections[s].first_unit + core::units(sections[s], kUnit))) ++s;
    body(s, unit - sections[s].first_unit);
  }
}

// Eight (or four, or two) elements in float64.
typedef float HalfVector __attribute__((vector_size(kVectorBytes / 2)));
GHOSTGRAD_HD Vector<double> widen(HalfVector v) { return __builtin_convertvector(v, Vector<double>); }
GHOSTGRAD_HD Vector<double> load_wide(const float* from) {
  HalfVector v;
  memcpy(&v, from, sizeof(v));
  return widen(v);
}

}  // namespace
}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
