// The noise kernels of CUDA, run on the CPU by emulation/, against their definition element by element: the same bits
// for perturb_, in three orders of threads and with fewer blocks than units; tensors as long as they must be, at odd
// addresses too.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "../core/expect.h"
#include "../core/noise_cases.h"
#include "core/second_difference.h"
#include "cpu/ops.h"
#include "cuda/nso_step.h"
#include "cuda/perturb.h"
#include "cuda/probe_dot.h"
#include "cuda/second_difference.h"
#include "threads.h"

using namespace ghostgrad;
using namespace noise_cases;

struct Way {
  emulation::Order order;
  int64_t max_blocks;
};
constexpr Way kWays[] = {{emulation::Order::kForwards, INT64_MAX},
                         {emulation::Order::kBackwards, 2},
                         {emulation::Order::kShuffled, INT64_MAX}};

static void go(const Way& way) {
  emulation::order = way.order;
  emulation::max_blocks = way.max_blocks;
}

// Copies of tensors in memory of exactly their length, every other one an element off the alignment of four.
template <class S>
struct Device {
  std::vector<std::unique_ptr<S[]>> memory;
  std::vector<void*> pointers;

  explicit Device(const std::vector<std::vector<S>>& tensors) {
    for (size_t t = 0; t < tensors.size(); ++t) {
      const size_t skip = t % 2;
      memory.emplace_back(new S[tensors[t].size() + skip]);
      pointers.push_back(memory.back().get() + skip);
      if (!tensors[t].empty()) std::memcpy(pointers.back(), tensors[t].data(), tensors[t].size() * sizeof(S));
    }
  }
  bool same(size_t t, const std::vector<S>& truth) const {
    return truth.empty() || std::memcmp(pointers[t], truth.data(), truth.size() * sizeof(S)) == 0;
  }
};

template <class S>
static void test_noise(const std::vector<core::Section>& parts, core::Distribution distribution) {
  using A = core::accumulation_t<S>;
  const core::Noise noise{0x123456789abcdefu, distribution};
  const double sigma = 0.37;
  const int64_t count = static_cast<int64_t>(parts.size());
  const auto start = tensors<S>(parts, 1), plus = tensors<S>(parts, 2), minus = tensors<S>(parts, 3);
  auto truth = start;
  std::vector<double> dots(parts.size());
  for (size_t s = 0; s < parts.size(); ++s) {
    for (int64_t e = 0; e < parts[s].elements; ++e) {
      const size_t i = static_cast<size_t>(e);
      const float x = xi(noise, parts[s], e);
      truth[s][i] =
          core::from_accumulation<S>(core::perturbed(core::to_accumulation(truth[s][i]), static_cast<A>(sigma), x));
      dots[s] += static_cast<double>(x) * (static_cast<double>(core::to_accumulation(plus[s][i])) -
                                           static_cast<double>(core::to_accumulation(minus[s][i])));
    }
    dots[s] /= 2 * sigma;
  }
  const Device<S> of_plus(plus), of_minus(minus);
  std::vector<double> first;
  for (const Way& way : kWays) {
    go(way);
    const Device<S> params(start);
    EXPECT(cuda::launch_perturb(kDType<S>, parts.data(), params.pointers.data(), count, noise, sigma, nullptr) ==
           cudaSuccess);
    for (size_t s = 0; s < parts.size(); ++s) {
      EXPECT(params.same(s, truth[s]), "perturb: distribution %d, section %zu", static_cast<int>(distribution), s);
    }
    std::vector<double> got(parts.size(), 0.0);  // what has no elements is left as it is
    const std::vector<double> poison(
        static_cast<size_t>(cuda::probe_dot_workspace(parts.data(), count)) / sizeof(double), NAN);
    std::vector<double> workspace = poison;
    EXPECT(cuda::launch_probe_dot(kDType<S>, parts.data(), of_plus.pointers.data(), of_minus.pointers.data(), count,
                                  noise, sigma, got.data(), workspace.data(), nullptr) == cudaSuccess);
    for (size_t s = 0; s < parts.size(); ++s) {
      EXPECT(std::fabs(got[s] - dots[s]) <= 1e-11, "probe_dot: section %zu: %g, not %g", s, got[s], dots[s]);
    }
    if (first.empty()) first = got;
    EXPECT(first == got, "probe_dot: the order of threads or the number of blocks shows");
    workspace = poison;
    std::vector<double> alone(parts.size(), 0.0);
    EXPECT(cuda::launch_probe_dot(kDType<S>, parts.data(), of_plus.pointers.data(), nullptr, count, noise, sigma,
                                  alone.data(), workspace.data(), nullptr) == cudaSuccess);
    std::vector<core::Section> host = parts;
    std::vector<double> expected(parts.size(), 0.0);
    cpu::probe_dot(kDType<S>, host.data(), of_plus.pointers.data(), nullptr, count, noise, sigma, expected.data(),
                   cpu::serial(), cpu::capability());
    for (size_t s = 0; s < parts.size(); ++s) EXPECT(std::fabs(alone[s] - expected[s]) <= 1e-11);
  }
}

template <class S>
static void test_nso_step() {
  std::vector<core::Section> parts;
  for (int64_t elements : {0, 1, 15, 64, 8192, 9001}) parts.push_back(whole(elements, 0));
  const int64_t count = static_cast<int64_t>(parts.size());
  const auto w = tensors<S>(parts, 1), grads = tensors<S>(parts, 2), centre = tensors<S>(parts, 3),
             momenta = tensors<S>(parts, 4);
  for (int mask = 0; mask < 16; ++mask) {
    const bool has_centre = mask & 1, has_momentum = mask & 2, nesterov = mask & 4, first = mask & 8;
    const core::NsoStep step{0.1, has_centre ? 0.3 : 0.0, 4, 0.9, nesterov ? 0.0 : 0.2, 0.05, nesterov, first};
    const auto entries = [&](const Device<S>& of_w, const Device<S>& of_grads, const Device<S>& of_centre,
                             const Device<S>& of_momenta) {
      std::vector<core::NsoTensor> all;
      for (size_t s = 0; s < parts.size(); ++s) {
        all.push_back({of_w.pointers[s], of_grads.pointers[s], has_centre ? of_centre.pointers[s] : nullptr,
                       has_momentum ? of_momenta.pointers[s] : nullptr});
      }
      return all;
    };
    const Device<S> true_w(w), true_momenta(momenta), of_grads(grads), of_centre(centre);
    std::vector<core::Section> host = parts;
    const std::vector<core::NsoTensor> expected = entries(true_w, of_grads, of_centre, true_momenta);
    // The portable kernels fuse nothing on this machine, and neither does the emulation.
    cpu::nso_step(kDType<S>, host.data(), expected.data(), count, step, cpu::serial(), cpu::Capability::kPortable);
    go(kWays[mask % 3]);
    const Device<S> of_w(w), of_momenta(momenta);
    const std::vector<core::NsoTensor> got = entries(of_w, of_grads, of_centre, of_momenta);
    EXPECT(cuda::launch_nso_step(kDType<S>, parts.data(), got.data(), count, step, nullptr) == cudaSuccess);
    for (size_t s = 0; s < parts.size(); ++s) {
      for (size_t i = 0; i < w[s].size(); ++i) {
        const auto wide = [](const void* tensor, size_t at) {
          return static_cast<double>(core::to_accumulation(static_cast<const S*>(tensor)[at]));
        };
        const double tolerance = sizeof(S) == 8 ? 1e-15 : sizeof(S) == 4 ? 1e-6 : 2e-2;
        EXPECT(std::fabs(wide(got[s].w, i) - wide(expected[s].w, i)) <= tolerance, "mask %d, section %zu", mask, s);
        if (has_momentum) EXPECT(std::fabs(wide(got[s].momentum, i) - wide(expected[s].momentum, i)) <= tolerance);
      }
    }
  }
}

template <class S>
static void test_second_difference() {
  for (int64_t count : {0, 1, 256, 1000}) {
    const std::vector<core::Section> parts{whole(count, 0)};
    const auto plus = tensors<S>(parts, 1), zero = tensors<S>(parts, 2), minus = tensors<S>(parts, 3);
    const Device<S> of_plus(plus), of_zero(zero), of_minus(minus);
    for (const Way& way : kWays) {
      go(way);
      std::vector<double> got(static_cast<size_t>(count), NAN);
      EXPECT(cuda::launch_second_difference(kDType<S>, of_plus.pointers[0], of_zero.pointers[0], of_minus.pointers[0],
                                            count, 0.01, got.data(), nullptr) == cudaSuccess);
      for (size_t i = 0; i < got.size(); ++i) {
        EXPECT(got[i] == core::second_difference(static_cast<double>(core::to_accumulation(plus[0][i])),
                                                 static_cast<double>(core::to_accumulation(zero[0][i])),
                                                 static_cast<double>(core::to_accumulation(minus[0][i])), 0.01));
      }
    }
  }
}

template <class S>
static void test() {
  for (core::Distribution distribution : kDistributions) test_noise<S>(sections(), distribution);
  test_nso_step<S>();
  test_second_difference<S>();
}

int main() {
  test<float>();
  test<double>();
  test<core::BFloat16>();
  test<core::Float16>();
  for (int64_t count : {0, 48, 49, 384, 385, 800}) {  // around the sizes of tables, with and without units
    std::vector<core::Section> many;
    for (int64_t s = 0; s < count; ++s) {
      many.push_back(whole(s * 7 % 5, static_cast<uint32_t>(s)));
      many.back().slot = static_cast<int32_t>(s);
    }
    test_noise<float>(many, core::Distribution::kNormal);
  }
  return failures != 0;
}
