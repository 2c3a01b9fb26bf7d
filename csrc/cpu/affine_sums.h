// Sums over positions that gradients of a scale and a shift are made of: shared by affine_sqnorm and norm_affine.
#pragma once

#include "core/tiles.h"
#include "cpu/simd.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

constexpr int64_t kGranule = 64;     // channels: buffers of sums have a multiple of them
constexpr int64_t kRun = 256;        // positions whose sum is kept in the accumulation type
constexpr int64_t kPixelRun = 4096;  // the same where positions are adjacent and a vector holds some of them
constexpr int64_t kUnits = 16;

// What is known of the scale's operand: nothing is wanted of it, it is x, or x has statistics for each position or for
// each channel of a position.
enum class Form { kShift, kPlain, kPerPosition, kPerChannel };

// One lane or all of them, so that tails and bodies of loops are the same code.
template <class V, class S>
GHOSTGRAD_HD V load_as(const S* from) {
  if constexpr (sizeof(V) == kVectorBytes) {
    return load(from);
  } else {
    return core::to_accumulation(*from);
  }
}
template <class V, class A>
GHOSTGRAD_HD void store_as(A* to, V value) {
  memcpy(to, &value, sizeof(value));
}

// kLanes<double> of the sums, widened.
GHOSTGRAD_HD Vector<double> load_wide(const double* from) { return load(from); }
GHOSTGRAD_HD Vector<double> load_wide(const float* from) {
  typename Narrow<float, kLanes<double>>::type narrow;
  memcpy(&narrow, from, sizeof(narrow));
  return __builtin_convertvector(narrow, Vector<double>);
}

// Adds up `length` adjacent positions of one channel.
template <Form kForm, class S, class A>
void add_pixels(int64_t length, const S* b, const S* x, A mean, A rstd, double* shift, double* scale) {
  constexpr int64_t kStep = kLanes<A>;
  for (int64_t first = 0; first < length; first += kPixelRun) {
    const int64_t last = core::minimum(length, first + kPixelRun);
    Vector<A> shifts[4] = {}, scales[4] = {};
    int64_t s = first;
    const auto add = [&](int v) {
      const Vector<A> gradient = load(b + s + v * kStep);
      shifts[v] += gradient;
      if constexpr (kForm != Form::kShift) {
        Vector<A> value = load(x + s + v * kStep);
        if constexpr (kForm == Form::kPerPosition) value = (value - mean) * rstd;
        scales[v] += value * gradient;
      }
    };
    for (; s + 4 * kStep <= last; s += 4 * kStep) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) add(v);
    }
    for (; s + kStep <= last; s += kStep) add(0);
    *shift += static_cast<double>(horizontal_sum<A>((shifts[0] + shifts[1]) + (shifts[2] + shifts[3])));
    if constexpr (kForm != Form::kShift) {
      *scale += static_cast<double>(horizontal_sum<A>((scales[0] + scales[1]) + (scales[2] + scales[3])));
    }
    for (; s < last; ++s) {
      const A gradient = core::to_accumulation(b[s]);
      *shift += static_cast<double>(gradient);
      if constexpr (kForm != Form::kShift) {
        A value = core::to_accumulation(x[s]);
        if constexpr (kForm == Form::kPerPosition) value = (value - mean) * rstd;
        *scale += static_cast<double>(value * gradient);
      }
    }
  }
}

// Adds the squares of `room` sums up, and the sums to a total if there is one.
template <class A>
double square_and_add(const A* values, int64_t room, double* total) {
  Vector<double> squares[2] = {};
  for (int64_t c = 0; c < room; c += 2 * kLanes<double>) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const int64_t at = c + v * kLanes<double>;
      const Vector<double> value = load_wide(values + at);
      squares[v] += value * value;
      if (total != nullptr) store_as(total + at, load(total + at) + value);
    }
  }
  return horizontal_sum<double>(squares[0] + squares[1]);
}

}  // namespace
}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
