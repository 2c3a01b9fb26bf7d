// Note [The address of noise]
//
// The noise xi of an element is a function of four numbers: the seed, the number of its parameter, the element's index
// in the full parameter (row by row, whatever the memory looks like), and the distribution. Nothing else enters: not
// the device, not the instruction set, not the number of threads, not how the parameter is sharded, not its dtype. This
// is a promise, bit for bit, and it keeps old results reproducible: whoever changes a line of this page breaks it.
//
//   key      = (seed mod 2^32, seed div 2^32)                           0 <= seed < 2^63
//   counter  = (block mod 2^32, block div 2^32, number, distribution)   0 <= number < 2^32
//   w0 .. w3 = philox(counter, key)                                     128 bits for the elements of a block
//
// The parameter's number stands in the counter and not in the key, so that no two addresses ever share a call: for one
// seed, Philox is a bijection of the counters.
//
//   rademacher (0): block = index div 128. Bit i = index mod 128 of the block, the lowest bit of w0 first, is the sign
//     bit: xi = 1 - 2 bit. Mean 0, variance 1.
//   normal (1): block = index div 4. Box-Muller: elements 0 and 1 of the block are r cos(a) and r sin(a), with
//       u = fl(fl(floor(w0 / 2)) + 1/2) 2^-31,  r = sqrt(-2 ln u),  a = 2 pi w1 2^-32,
//     where fl rounds to float32 and 0 < u <= 1;
//     elements 2 and 3 are the same of w2 and w3. Mean 0, variance 1, |xi| <= 6.7.
//   uniform (2): block = index div 4. Element i: xi = (floor(w_i / 2^8) + 1/2) 2^-24 - 1/2, exact in float32; in (-1/2,
//     1/2), symmetric, variance 1/12: the rounding error of a quantiser whose step is 1.
//
// xi is a float32 number for every dtype of the parameter: a float64 model draws the noise of its float32 copy. What is
// done with it is done in the parameter's accumulation type (float64 for float64, float32 otherwise): w + sigma * xi,
// the product rounded, the sum rounded, and rounded once more to the parameter's dtype.
//
// The normal distribution's logarithm, sine and cosine are the polynomials below, evaluated in float32 by
// additions, multiplications and a square root, each rounded by itself. So every machine gets the same bits, provided
// that no compiler fuses a product and a sum: files that include this header are compiled with -ffp-contract=off, and
// on a GPU the arithmetic is spelt out. xi is within 5 units in the last place of its definition, or within 2^-23 where
// that is more.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"
#include "core/philox.h"

namespace ghostgrad::core {

enum class Distribution : int32_t { kRademacher = 0, kNormal = 1, kUniform = 2 };

// Elements that a block of 128 bits serves.
GHOSTGRAD_HD constexpr int64_t block_elements(Distribution distribution) {
  return distribution == Distribution::kRademacher ? 128 : 4;
}

struct Noise {
  uint64_t seed;
  Distribution distribution;

  GHOSTGRAD_HD constexpr PhiloxKey key() const {
    return PhiloxKey{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  }
  GHOSTGRAD_HD constexpr PhiloxBlock block(uint32_t number, uint64_t block) const {
    return philox(PhiloxBlock{{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), number,
                               static_cast<uint32_t>(distribution)}},
                  key());
  }
};

// Arithmetic on one float32, each result rounded by itself. csrc/cpu/noise.h has the same on vectors.
struct Lane {
  using Real = float;
  using Bits = uint32_t;
  using Integer = int32_t;

#if defined(__CUDA_ARCH__)  // these are never fused
  static GHOSTGRAD_HD float add(float x, float y) { return __fadd_rn(x, y); }
  static GHOSTGRAD_HD float multiply(float x, float y) { return __fmul_rn(x, y); }
  static GHOSTGRAD_HD float root(float x) { return __fsqrt_rn(x); }
#else
  static GHOSTGRAD_HD float add(float x, float y) { return x + y; }
  static GHOSTGRAD_HD float multiply(float x, float y) { return x * y; }
  static GHOSTGRAD_HD float root(float x) { return __builtin_sqrtf(x); }
#endif
  static GHOSTGRAD_HD float constant(float value) { return value; }
  static GHOSTGRAD_HD float real(int32_t value) { return static_cast<float>(value); }  // to nearest, ties to even
  static GHOSTGRAD_HD float from_bits(uint32_t bits) { return float_from_bits(bits); }
  static GHOSTGRAD_HD uint32_t bits(float value) { return bits_from_float(value); }
  static GHOSTGRAD_HD int32_t integer(uint32_t bits) { return static_cast<int32_t>(bits); }
  static GHOSTGRAD_HD uint32_t bits_of(int32_t value) { return static_cast<uint32_t>(value); }
  static GHOSTGRAD_HD uint32_t choose(uint32_t odd, uint32_t yes, uint32_t no) { return odd != 0 ? yes : no; }
};

// c0 + x (c1 + x (c2 + ...)).
template <class M>
GHOSTGRAD_HD typename M::Real polynomial(typename M::Real, float c0) {
  return M::constant(c0);
}
template <class M, class... Rest>
GHOSTGRAD_HD typename M::Real polynomial(typename M::Real x, float c0, Rest... rest) {
  return M::add(M::multiply(polynomial<M>(x, rest...), x), M::constant(c0));
}

// The radius sqrt(-2 ln u) of a word. With u = m 2^e and m in [sqrt(1/2), sqrt(2)), -2 ln u = -2 ln(m) - 2 ln(2) e, and
// -2 ln(1 + x) = -2 x + x^2 + x^3 P(x) with a relative error of 3e-8 (P minimises the largest), halved by the root.
// Even and odd powers of P are added apart, because the chain is half as long.
template <class M>
GHOSTGRAD_HD typename M::Real radius(typename M::Bits word) {
  using Real = typename M::Real;
  const Real scaled = M::add(M::real(M::integer(word >> 1)), M::constant(0.5f));  // 2^31 u
  const auto bits = M::bits(scaled);
  const auto exponent = M::integer(bits - 0x3f3504f3u) >> 23;  // 0x3f3504f3 are the bits of sqrt(1/2)
  const Real x = M::add(M::from_bits(bits - (M::bits_of(exponent) << 23)), M::constant(-1.0f));
  const Real square = M::multiply(x, x);
  const Real even = polynomial<M>(square, -0.66667819f, -0.399261266f, -0.298295379f, -0.174008608f);
  const Real odd = polynomial<M>(square, 0.500026762f, 0.331551701f, 0.285349727f);
  const Real cubic = M::multiply(M::multiply(square, x), M::add(even, M::multiply(odd, x)));
  const Real of_mantissa = M::add(cubic, M::add(square, M::multiply(x, M::constant(-2.0f))));
  const Real of_exponent = M::multiply(M::real(exponent - 31), M::constant(-1.38629436f));
  return M::root(M::add(of_exponent, of_mantissa));
}

// Cosine and sine of 2 pi word / 2^32. The word is a number of quarter turns, rounded to nearest, and a rest t in
// [-1/2, 1/2); the polynomials give cos(pi t / 2) and sin(pi t / 2) with relative errors of 5e-11 and 3e-9. After an
// odd number of quarter turns the two change places; half turns change the sign of the sine, and of the cosine a
// quarter turn earlier.
template <class M>
GHOSTGRAD_HD void turn(typename M::Bits word, typename M::Real& cosine, typename M::Real& sine) {
  using Real = typename M::Real;
  const auto turned = word + 0x20000000u;  // the quarter turns are its upper two bits
  const Real t = M::multiply(M::real(M::integer(word << 2)), M::constant(0x1p-32f));
  const Real square = M::multiply(t, t);
  const Real c = polynomial<M>(square, 1.0f, -1.23370051f, 0.253669232f, -0.0208602883f, 0.000904021668f);
  const Real s = M::multiply(t, polynomial<M>(square, 1.57079637f, -0.64596349f, 0.079680033f, -0.00460166112f));
  const auto odd = turned & 0x40000000u;
  cosine = M::from_bits(M::choose(odd, M::bits(s), M::bits(c)) ^ ((turned + 0x40000000u) & 0x80000000u));
  sine = M::from_bits(M::choose(odd, M::bits(c), M::bits(s)) ^ (turned & 0x80000000u));
}

// Two normal numbers from two words.
template <class M>
GHOSTGRAD_HD void normal_pair(typename M::Bits first, typename M::Bits second, typename M::Real& x,
                              typename M::Real& y) {
  const typename M::Real r = radius<M>(first);
  turn<M>(second, x, y);
  x = M::multiply(r, x);
  y = M::multiply(r, y);
}

// A uniform number from a word: floor(word / 2^8) + 1/2 - 2^23 is half an odd number of 25 bits.
template <class M>
GHOSTGRAD_HD typename M::Real uniform(typename M::Bits word) {
  const auto odd = (M::integer(word ^ 0x80000000u) >> 7) | 1;
  return M::multiply(M::real(odd), M::constant(0x1p-25f));
}

// One or minus one, by the sign bit `bit` (0 or 1).
GHOSTGRAD_HD float rademacher(uint32_t bit) { return float_from_bits(0x3f800000u | bit << 31); }

// The four elements of a block of the normal or the uniform distribution.
GHOSTGRAD_HD void draw_four(Distribution distribution, const PhiloxBlock& block, float (&xi)[4]) {
  if (distribution == Distribution::kNormal) {
    normal_pair<Lane>(block.word[0], block.word[1], xi[0], xi[1]);
    normal_pair<Lane>(block.word[2], block.word[3], xi[2], xi[3]);
  } else {
    for (int i = 0; i < 4; ++i) xi[i] = uniform<Lane>(block.word[i]);
  }
}

// w + sigma * xi, each step rounded by itself.
GHOSTGRAD_HD float perturbed(float w, float sigma, float xi) { return Lane::add(w, Lane::multiply(sigma, xi)); }
GHOSTGRAD_HD double perturbed(double w, double sigma, float xi) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(w, __dmul_rn(sigma, static_cast<double>(xi)));
#else
  return w + sigma * static_cast<double>(xi);
#endif
}

}  // namespace ghostgrad::core
