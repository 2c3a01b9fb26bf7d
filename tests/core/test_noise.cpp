// The noise ops on the CPU in every instruction set that this machine has, against their definition element by element:
// the same bits, in any order of units.
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/ops.h"
#include "expect.h"
#include "noise_cases.h"

using namespace ghostgrad;
using namespace noise_cases;

static cpu::ParallelFor backwards() {
  return cpu::ParallelFor{[](int64_t count, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
    for (int64_t unit = count; unit-- > 0;) body(unit, unit + 1, context);
  }};
}

template <class S>
static bool same(const std::vector<S>& x, const std::vector<S>& y) {
  return std::memcmp(x.data(), y.data(), x.size() * sizeof(S)) == 0;
}

// Every index belongs to exactly one unit, and no unit splits a block of bits.
static void test_units() {
  for (const core::Section& section : sections()) {
    for (int64_t size : {256, 8192, 32768}) {
      std::vector<int> seen(static_cast<size_t>(section.elements));
      for (int64_t unit = 0; unit < core::units(section, size); ++unit) {
        const core::Span span = core::span_of(section, unit, size);
        for (int64_t index = span.begin; index < span.end; ++index) {
          const int64_t element = span.local + index - span.begin;
          EXPECT(index_of(section, element) == index, "element %ld", element);
          ++seen[static_cast<size_t>(element)];
          EXPECT(index / size == span.begin / size);
        }
      }
      for (int count : seen) EXPECT(count == 1);
    }
  }
}

template <class S>
static void test(cpu::Capability capability, core::Distribution distribution) {
  using A = core::accumulation_t<S>;
  const core::Noise noise{0x123456789abcdefu, distribution};
  const double sigma = 0.37;
  std::vector<core::Section> parts = sections();
  const int64_t count = static_cast<int64_t>(parts.size());
  std::vector<std::vector<S>> truth = tensors<S>(parts, 1), plus = tensors<S>(parts, 2), minus = tensors<S>(parts, 3);
  std::vector<double> dots(parts.size());
  for (size_t s = 0; s < parts.size(); ++s) {
    long double dot = 0;
    for (int64_t e = 0; e < parts[s].elements; ++e) {
      const size_t i = static_cast<size_t>(e);
      const float x = xi(noise, parts[s], e);
      truth[s][i] =
          core::from_accumulation<S>(core::perturbed(core::to_accumulation(truth[s][i]), static_cast<A>(sigma), x));
      dot += static_cast<long double>(x) * (static_cast<long double>(core::to_accumulation(plus[s][i])) -
                                            static_cast<long double>(core::to_accumulation(minus[s][i])));
    }
    dots[s] = static_cast<double>(dot / (2 * sigma));
  }
  const char* name = cpu::name_of(capability);
  std::vector<double> serial_dots;
  for (const cpu::ParallelFor& parallel : {cpu::serial(), backwards()}) {
    std::vector<std::vector<S>> params = tensors<S>(parts, 1);
    cpu::perturb(kDType<S>, parts.data(), pointers(params).data(), count, noise, sigma, parallel, capability);
    for (size_t s = 0; s < parts.size(); ++s) {
      EXPECT(same(params[s], truth[s]), "%s, distribution %d, section %zu", name, static_cast<int>(distribution), s);
    }
    std::vector<double> got(parts.size(), NAN);
    const std::vector<void*> of_plus = pointers(plus), of_minus = pointers(minus);
    cpu::probe_dot(kDType<S>, parts.data(), of_plus.data(), of_minus.data(), count, noise, sigma, got.data(), parallel,
                   capability);
    for (size_t s = 0; s < parts.size(); ++s) {
      EXPECT(std::fabs(got[s] - dots[s]) <= 1e-11, "%s, section %zu: %g, not %g", name, s, got[s], dots[s]);
    }
    if (serial_dots.empty()) serial_dots = got;
    EXPECT(got == serial_dots, "%s: the order of units shows", name);
    static std::vector<double> first[3][4];
    std::vector<double>& reference = first[static_cast<int>(distribution)][static_cast<int>(kDType<S>)];
    if (reference.empty()) reference = got;
    EXPECT(got == reference, "%s: the instruction set shows", name);
  }
  std::vector<std::vector<S>> zeros = tensors<S>(parts, 3);
  for (auto& tensor : zeros) std::memset(static_cast<void*>(tensor.data()), 0, tensor.size() * sizeof(S));
  std::vector<double> without(parts.size()), with_zeros(parts.size());
  const std::vector<void*> of_plus = pointers(plus), of_zeros = pointers(zeros);
  cpu::probe_dot(kDType<S>, parts.data(), of_plus.data(), nullptr, count, noise, sigma, without.data(), cpu::serial(),
                 capability);
  cpu::probe_dot(kDType<S>, parts.data(), of_plus.data(), of_zeros.data(), count, noise, sigma, with_zeros.data(),
                 cpu::serial(), capability);
  EXPECT(without == with_zeros);
}

template <class S>
static void test_nso_step(cpu::Capability capability) {
  using A = core::accumulation_t<S>;
  std::vector<core::Section> parts;
  for (int64_t elements : {0, 1, 15, 64, 40001}) parts.push_back(whole(elements, 0));
  const int64_t count = static_cast<int64_t>(parts.size());
  for (int mask = 0; mask < 16; ++mask) {
    const bool has_centre = mask & 1, has_momentum = mask & 2, nesterov = mask & 4, first = mask & 8;
    const core::NsoStep step{0.1, has_centre ? 0.3 : 0.0, 4, 0.9, nesterov ? 0.0 : 0.2, 0.05, nesterov, first};
    auto w = tensors<S>(parts, 1), grads = tensors<S>(parts, 2), centre = tensors<S>(parts, 3),
         momenta = tensors<S>(parts, 4);
    const auto start = w, velocity = momenta;
    std::vector<core::NsoTensor> entries;
    for (size_t s = 0; s < parts.size(); ++s) {
      entries.push_back({w[s].data(), grads[s].data(), has_centre ? centre[s].data() : nullptr,
                         has_momentum ? momenta[s].data() : nullptr});
    }
    cpu::nso_step(kDType<S>, parts.data(), entries.data(), count, step, backwards(), capability);
    const double tolerance = sizeof(S) == 8 ? 1e-15 : sizeof(S) == 4 ? 1e-6 : 2e-2;
    for (size_t s = 0; s < parts.size(); ++s) {
      for (size_t i = 0; i < w[s].size(); ++i) {
        const auto wide = [](S value) { return static_cast<double>(static_cast<A>(core::to_accumulation(value))); };
        double g = wide(grads[s][i]) * (1 - step.mix) / 4 + (has_centre ? step.mix * wide(centre[s][i]) : 0);
        g += 0.05 * wide(start[s][i]);
        double m = first ? g : 0.9 * wide(velocity[s][i]) + (1 - step.dampening) * g;
        if (has_momentum) {
          EXPECT(std::fabs(wide(momenta[s][i]) - m) <= tolerance);
          g = nesterov ? g + 0.9 * m : m;
        }
        EXPECT(std::fabs(wide(w[s][i]) - (wide(start[s][i]) - 0.1 * g)) <= tolerance, "%s, mask %d, section %zu",
               cpu::name_of(capability), mask, s);
      }
      if (!has_momentum) EXPECT(same(momenta[s], velocity[s]));
    }
  }
}

template <class S>
static void test_second_difference(cpu::Capability capability) {
  std::vector<core::Section> parts{whole(70000, 0)};
  const auto plus = tensors<S>(parts, 1), zero = tensors<S>(parts, 2), minus = tensors<S>(parts, 3);
  std::vector<double> got(70000, NAN);
  cpu::second_difference(kDType<S>, plus[0].data(), zero[0].data(), minus[0].data(), 70000, 0.01, got.data(),
                         backwards(), capability);
  for (size_t i = 0; i < got.size(); ++i) {
    const long double p = core::to_accumulation(plus[0][i]), z = core::to_accumulation(zero[0][i]),
                      m = core::to_accumulation(minus[0][i]);
    EXPECT(std::fabs(static_cast<double>((p + m - 2 * z) / (0.01L * 0.01L)) - got[i]) <= 1e-11);
  }
}

template <class S>
static void test_all(cpu::Capability capability) {
  for (core::Distribution distribution : kDistributions) test<S>(capability, distribution);
  test_nso_step<S>(capability);
  test_second_difference<S>(capability);
}

int main() {
  test_units();
  for (cpu::Capability capability :
       {cpu::Capability::kPortable, cpu::Capability::kAvx2, cpu::Capability::kAvx512, cpu::Capability::kAvx512Bf16}) {
    if (capability > cpu::capability()) continue;  // a lesser machine, or GHOSTGRAD_CPU_CAPABILITY
    test_all<float>(capability);
    test_all<double>(capability);
    test_all<core::BFloat16>(capability);
    test_all<core::Float16>(capability);
  }
  return failures;
}
