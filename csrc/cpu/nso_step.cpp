// nso_step_ on the CPU: the mean of the perturbed gradients and the step of SGD, each element read and written once.
#include "core/nso.h"
#include "core/storage.h"
#include "cpu/isa.h"
#include "cpu/noise.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

// x a + y, rounded once where the machine can, as PyTorch's kernels do; and x a.
struct Arithmetic {
  static GHOSTGRAD_HD float fused(float x, float a, float y) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(x, a, y);
#else
    return x * a + y;
#endif
  }
  static GHOSTGRAD_HD double fused(double x, double a, double y) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fma(x, a, y);
#else
    return x * a + y;
#endif
  }
  template <class A>
  static GHOSTGRAD_HD Vector<A> fused(Vector<A> x, A a, Vector<A> y) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 8) {
      return _mm512_fmadd_pd(x, _mm512_set1_pd(a), y);
    } else {
      return _mm512_fmadd_ps(x, _mm512_set1_ps(a), y);
    }
#elif defined(__FMA__)
    if constexpr (sizeof(A) == 8) {
      return _mm256_fmadd_pd(x, _mm256_set1_pd(a), y);
    } else {
      return _mm256_fmadd_ps(x, _mm256_set1_ps(a), y);
    }
#else
    for (int lane = 0; lane < kLanes<A>; ++lane) x[lane] = fused(x[lane], a, y[lane]);
    return x;
#endif
  }
  template <class F, class A>
  static GHOSTGRAD_HD F scaled(F x, A a) {
    return x * a;
  }
};
template <class A>
struct VectorArithmetic {
  static GHOSTGRAD_HD Vector<A> fused(Vector<A> x, A a, Vector<A> y) { return Arithmetic::fused<A>(x, a, y); }
  static GHOSTGRAD_HD Vector<A> scaled(Vector<A> x, A a) { return x * a; }
};

// `count` elements from element `i` on.
template <class S, class A = core::accumulation_t<S>>
GHOSTGRAD_HD void update(const core::NsoTensor& tensor, int64_t i, int64_t count, const core::NsoFactors<A>& factors) {
  const bool has_centre = tensor.centre != nullptr, has_momentum = tensor.momentum != nullptr;
  S* w = static_cast<S*>(tensor.w) + i;
  const S* grads = static_cast<const S*>(tensor.grads) + i;
  const S* centre = has_centre ? static_cast<const S*>(tensor.centre) + i : nullptr;
  S* momentum = has_momentum ? static_cast<S*>(tensor.momentum) + i : nullptr;
  int64_t j = 0;
  for (; j + kLanes<A> <= count; j += kLanes<A>) {
    Vector<A> value = load(w + j), velocity = {};
    if (has_momentum && !factors.first) velocity = load(momentum + j);
    const Vector<A> at_centre = has_centre ? load(centre + j) : Vector<A>{};
    core::nso_update<VectorArithmetic<A>>(factors, has_centre, has_momentum, load(grads + j), at_centre, value,
                                          velocity);
    store(w + j, value);
    if (has_momentum) store(momentum + j, velocity);
  }
  for (; j < count; ++j) {
    A value = core::to_accumulation(w[j]), velocity = A(0);
    if (has_momentum && !factors.first) velocity = core::to_accumulation(momentum[j]);
    const A at_centre = has_centre ? core::to_accumulation(centre[j]) : A(0);
    core::nso_update<Arithmetic>(factors, has_centre, has_momentum, core::to_accumulation(grads[j]), at_centre, value,
                                 velocity);
    w[j] = core::from_accumulation<S>(value);
    if (has_momentum) momentum[j] = core::from_accumulation<S>(velocity);
  }
}

template <class S>
void run(core::Section* sections, const core::NsoTensor* tensors, int64_t count, const core::NsoStep& step,
         ParallelFor parallel) {
  const core::NsoFactors<core::accumulation_t<S>> factors(step);
  auto body = [&](int64_t begin, int64_t end) {
    for_units(sections, begin, end, [&](int64_t s, int64_t unit) {
      const core::Span span = core::span_of(sections[s], unit, kUnit);
      update<S>(tensors[s], span.local, span.end - span.begin, factors);
    });
  };
  const int64_t units = core::number_units(sections, count, kUnit);
  parallel(units, 32.0 * static_cast<double>(units * kUnit), body);
}

}  // namespace

void nso_step(core::DType dtype, core::Section* sections, const core::NsoTensor* tensors, int64_t count,
              const core::NsoStep& step, ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(dtype, run, sections, tensors, count, step, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
