// probe_dot on the CPU: sum_i xi_i (plus_i - minus_i) / (2 sigma) of each tensor, at the speed of reading plus and
// minus; xi is drawn again, kNoiseTile at a time.
//
// Sixteen sums run side by side in float64: number j takes the elements whose index in the full parameter is j mod 16,
// in ascending order. They are added by halves at the end of a unit, the units pairwise. So results are the same bit
// for bit on any number of threads and in any instruction set.
#include "core/reduce.h"
#include "core/storage.h"
#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/scratch.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

constexpr int64_t kSums = 16;
constexpr int kWide = kLanes<double>;

// kLanes<float> elements of a gradient, or zeros if there is none, in float64.
struct WidePair {
  Vector<double> low, high;
};
template <class S>
GHOSTGRAD_HD WidePair load_pair(const S* from) {
  if constexpr (sizeof(S) == 8) {
    return WidePair{load(from), load(from + kWide)};
  } else {
    HalfVector halves[2];
    const Vector<float> v = load(from);
    memcpy(&halves, &v, sizeof(v));
    return WidePair{widen(halves[0]), widen(halves[1])};
  }
}
template <class S>
GHOSTGRAD_HD double load_one(const S* from) {
  return static_cast<double>(core::to_accumulation(*from));
}

// `place`: the first element's index modulo 16.
template <class S>
GHOSTGRAD_HD void add_products(const S* plus, const S* minus, int64_t count, const float* xi, int64_t place,
                               Vector<double> (&sums)[kSums / kWide]) {
  double* sum = reinterpret_cast<double*>(sums);
  const auto add_one = [&](int64_t i) {
    const double difference = load_one(plus + i) - (minus == nullptr ? 0.0 : load_one(minus + i));
    sum[(place + i) % kSums] += static_cast<double>(xi[i]) * difference;
  };
  int64_t i = 0;
  for (; i < count && (place + i) % kSums != 0; ++i) add_one(i);
  for (; i + kSums <= count; i += kSums) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kSums; j += 2 * kWide) {
      WidePair value = load_pair(plus + i + j);
      if (minus != nullptr) {
        const WidePair other = load_pair(minus + i + j);
        value.low -= other.low;
        value.high -= other.high;
      }
      sums[j / kWide] += load_wide(xi + i + j) * value.low;
      sums[j / kWide + 1] += load_wide(xi + i + j + kWide) * value.high;
    }
  }
  for (; i < count; ++i) add_one(i);
}

template <class S>
void run(core::Section* sections, const void* const* plus, const void* const* minus, int64_t count,
         const core::Noise& noise, double sigma, double* dots, ParallelFor parallel) {
  const int64_t units = core::number_units(sections, count, kUnit);
  Scratch scratch(Scratch::room<double>(units));
  double* partial = scratch.take<double>(units);
  auto body = [&](int64_t begin, int64_t end) {
    for_units(sections, begin, end, [&](int64_t s, int64_t unit) {
      const S* of_plus = static_cast<const S*>(plus[s]);
      const S* of_minus = minus == nullptr ? nullptr : static_cast<const S*>(minus[s]);
      Vector<double> sums[kSums / kWide] = {};
      const core::Span span = core::span_of(sections[s], unit, kUnit);
      for_noise(noise, sections[s], unit, [&](int64_t i, int64_t length, const float* xi) {
        add_products(of_plus + i, of_minus == nullptr ? nullptr : of_minus + i, length, xi,
                     (span.begin + i - span.local) % kSums, sums);
      });
      double sum[kSums];
      memcpy(sum, &sums, sizeof(sums));
      for (int64_t half = kSums / 2; half > 0; half /= 2) {
        for (int64_t j = 0; j < half; ++j) sum[j] += sum[j + half];
      }
      partial[sections[s].first_unit + unit] = sum[0];
    });
  };
  parallel(units, 16.0 * static_cast<double>(units * kUnit), body);
  for (int64_t s = 0; s < count; ++s) {
    const double sum = core::pairwise_sum(partial + sections[s].first_unit, core::units(sections[s], kUnit), 1);
    dots[sections[s].slot] = sum / (2.0 * sigma);
  }
}

}  // namespace

void probe_dot(core::DType dtype, core::Section* sections, const void* const* plus, const void* const* minus,
               int64_t count, const core::Noise& noise, double sigma, double* dots, ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(dtype, run, sections, plus, minus, count, noise, sigma, dots, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
