// perturb_ on the CPU: w <- w + sigma * xi, at the speed of reading and writing w.
//
// A unit of work is kUnit indices of one tensor; the noise of kNoiseTile of them is drawn into the first-level cache
// and added. Rademacher noise takes a Philox call for 128 elements and three instructions for a vector.
#include "core/storage.h"
#include "cpu/isa.h"
#include "cpu/noise.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

template <class S, class A = core::accumulation_t<S>>
GHOSTGRAD_HD void add_noise(S* w, int64_t count, A sigma, const float* xi) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    if constexpr (sizeof(A) == 8) {
      store(w + i, load(w + i) + sigma * load_wide(xi + i));
    } else {
      store(w + i, load(w + i) + sigma * load(xi + i));
    }
  }
  for (; i < count; ++i) w[i] = core::from_accumulation<S>(core::perturbed(core::to_accumulation(w[i]), sigma, xi[i]));
}

template <class S>
void run(core::Section* sections, void* const* params, int64_t count, const core::Noise& noise, double sigma,
         ParallelFor parallel) {
  const auto scale = static_cast<core::accumulation_t<S>>(sigma);
  auto body = [&](int64_t begin, int64_t end) {
    for_units(sections, begin, end, [&](int64_t s, int64_t unit) {
      S* w = static_cast<S*>(params[s]);
      for_noise(noise, sections[s], unit,
                [&](int64_t i, int64_t length, const float* xi) { add_noise(w + i, length, scale, xi); });
    });
  };
  const int64_t units = core::number_units(sections, count, kUnit);
  parallel(units, 16.0 * static_cast<double>(units * kUnit), body);
}

}  // namespace

void perturb(core::DType dtype, core::Section* sections, void* const* params, int64_t count, const core::Noise& noise,
             double sigma, ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(dtype, run, sections, params, count, noise, sigma, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
