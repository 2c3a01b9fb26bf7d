// The CPU kernels of every instruction set that this machine has, against loops in long double, with threads that come
// in any order.
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <random>
#include <vector>

#include "convolutions.h"
#include "cpu/ops.h"
#include "expect.h"

using namespace ghostgrad;

// One unit at a time, the last one first: what a thread pool might do at its worst.
static cpu::ParallelFor backwards() {
  return cpu::ParallelFor{[](int64_t count, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
    for (int64_t unit = count; unit-- > 0;) body(unit, unit + 1, context);
  }};
}

template <class S>
static core::DType dtype_of();
template <>
core::DType dtype_of<float>() {
  return core::DType::kFloat32;
}
template <>
core::DType dtype_of<double>() {
  return core::DType::kFloat64;
}
template <>
core::DType dtype_of<core::BFloat16>() {
  return core::DType::kBFloat16;
}
template <>
core::DType dtype_of<core::Float16>() {
  return core::DType::kFloat16;
}

template <class S>
static std::vector<S> draw(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<S> values(static_cast<size_t>(count) + 1);
  for (S& value : values) value = core::from_accumulation<S>(static_cast<core::accumulation_t<S>>(uniform(generator)));
  return values;
}

static bool close(double value, long double truth, long double scale, double tolerance) {
  return std::fabs(static_cast<double>(value - truth)) <= tolerance * static_cast<double>(scale) + 1e-300;
}

template <class S>
static void test(cpu::Capability capability, int64_t B, int64_t T, int64_t p, int64_t d, int64_t pad) {
  using A = core::accumulation_t<S>;
  const double epsilon = sizeof(A) == 8 ? 1e-14 : 2e-6, store_epsilon = sizeof(S) == 2 ? 1e-2 : epsilon;
  const std::vector<S> a = draw<S>(B * T * (p + pad), 1), b = draw<S>(B * T * (d + pad), 2);
  const std::vector<A> weights = draw<A>(B, 3);
  const core::Operands operands{a.data(),      b.data(), dtype_of<S>(), B,      T, p, d,
                                T * (p + pad), p + pad,  T * (d + pad), d + pad};

  std::vector<long double> wgrad(static_cast<size_t>(d * p)), scale(static_cast<size_t>(d * p)),
      sqnorm(static_cast<size_t>(B));
  for (int64_t i = 0; i < B; ++i) {
    for (int64_t r = 0; r < d; ++r) {
      for (int64_t c = 0; c < p; ++c) {
        long double sum = 0, magnitude = 0;
        for (int64_t t = 0; t < T; ++t) {
          const long double term =
              static_cast<long double>(core::to_accumulation(a[static_cast<size_t>((i * T + t) * (p + pad) + c)])) *
              core::to_accumulation(b[static_cast<size_t>((i * T + t) * (d + pad) + r)]);
          sum += term;
          magnitude += std::fabs(term);
        }
        sqnorm[static_cast<size_t>(i)] += sum * sum;
        wgrad[static_cast<size_t>(r * p + c)] += weights[static_cast<size_t>(i)] * sum;
        scale[static_cast<size_t>(r * p + c)] += std::fabs(weights[static_cast<size_t>(i)]) * magnitude;
      }
    }
  }

  const char* name = cpu::name_of(capability);
  std::vector<A> forwards_norms, backwards_norms;
  for (const cpu::ParallelFor& parallel : {cpu::serial(), backwards()}) {
    std::vector<A> outer(static_cast<size_t>(B), A(-1)), gram = outer, fused = outer;
    std::vector<S> product(static_cast<size_t>(d * p));
    cpu::outer_sqnorm(operands, outer.data(), parallel, capability);
    cpu::gram_sqnorm(operands, gram.data(), parallel, capability);
    cpu::wgrad_sqnorm(operands, weights.data(), product.data(), fused.data(), parallel, capability);
    for (size_t i = 0; i < outer.size(); ++i) {
      EXPECT(close(outer[i], sqnorm[i], sqnorm[i], epsilon), "%s outer (%ld, %ld, %ld, %ld)", name, B, T, p, d);
      EXPECT(close(gram[i], sqnorm[i], sqnorm[i] + 1e-3L, 20 * epsilon), "%s gram (%ld, %ld, %ld, %ld)", name, B, T, p,
             d);
      EXPECT(close(fused[i], sqnorm[i], sqnorm[i], epsilon), "%s fused (%ld, %ld, %ld, %ld)", name, B, T, p, d);
    }
    for (size_t e = 0; e < product.size(); ++e) {
      EXPECT(close(core::to_accumulation(product[e]), wgrad[e], scale[e], store_epsilon),
             "%s wgrad (%ld, %ld, %ld, %ld)", name, B, T, p, d);
    }
    std::vector<A>& norms = forwards_norms.empty() ? forwards_norms : backwards_norms;
    norms = outer;
    norms.insert(norms.end(), gram.begin(), gram.end());
    for (const S& value : product) norms.push_back(core::to_accumulation(value));
  }
  EXPECT(forwards_norms == backwards_norms || B * d * p == 0, "%s: the order of units shows", name);

  const core::Rows rows{a.data(), dtype_of<S>(), B, T * p, T * (p + pad)};
  if (pad == 0) {
    std::vector<A> row(static_cast<size_t>(B), A(-1));
    cpu::row_sqnorm(rows, row.data(), backwards(), capability);
    for (int64_t i = 0; i < B; ++i) {
      long double truth = 0;
      for (int64_t j = 0; j < T * p; ++j) {
        const long double value = core::to_accumulation(a[static_cast<size_t>(i * T * p + j)]);
        truth += value * value;
      }
      EXPECT(close(row[static_cast<size_t>(i)], truth, truth, epsilon), "%s row (%ld, %ld)", name, B, T * p);
    }
  }
}

template <class S>
static void test_convolution(cpu::Capability capability, const convolutions::Case& c) {
  using A = core::accumulation_t<S>;
  const double epsilon = sizeof(A) == 8 ? 1e-13 : 1e-5, store_epsilon = sizeof(S) == 2 ? 1e-2 : epsilon;
  core::Convolution o = convolutions::convolution(c, dtype_of<S>());
  const std::vector<S> x = draw<S>(convolutions::x_elements(o), 1), b = draw<S>(convolutions::b_elements(o), 2);
  o.x = x.data();
  o.b = b.data();
  const std::vector<long double> per_sample = convolutions::per_sample_wgrad<S>(o);
  std::vector<long double> wgrad(static_cast<size_t>(o.elements())), sqnorm(static_cast<size_t>(o.batch));
  long double scale = 0;
  for (size_t e = 0; e < per_sample.size(); ++e) {
    wgrad[e % wgrad.size()] += per_sample[e];
    sqnorm[e / wgrad.size()] += per_sample[e] * per_sample[e];
  }
  for (long double value : wgrad) scale = std::fmax(scale, std::fabs(value));

  const char* name = cpu::name_of(capability);
  const int number = static_cast<int>(&c - convolutions::kCases);
  std::vector<std::vector<A>> runs;
  for (const cpu::ParallelFor& parallel : {cpu::serial(), backwards()}) {
    std::vector<A> outer(static_cast<size_t>(o.batch), A(-1)), gram = outer, fused = outer;
    std::vector<S> product(static_cast<size_t>(o.elements()));
    cpu::conv_outer_sqnorm(o, outer.data(), parallel, capability);
    cpu::conv_gram_sqnorm(o, gram.data(), parallel, capability);
    cpu::conv_wgrad_sqnorm(o, product.data(), fused.data(), parallel, capability);
    for (size_t i = 0; i < outer.size(); ++i) {
      EXPECT(close(outer[i], sqnorm[i], sqnorm[i], epsilon), "%s conv outer %d", name, number);
      EXPECT(close(gram[i], sqnorm[i], sqnorm[i] + 1e-3L, epsilon), "%s conv gram %d", name, number);
      EXPECT(close(fused[i], sqnorm[i], sqnorm[i], epsilon), "%s conv fused %d", name, number);
    }
    for (size_t e = 0; e < product.size(); ++e) {
      EXPECT(close(core::to_accumulation(product[e]), wgrad[e], scale, store_epsilon), "%s conv wgrad %d", name,
             number);
    }
    outer.insert(outer.end(), gram.begin(), gram.end());
    outer.insert(outer.end(), fused.begin(), fused.end());
    for (const S& value : product) outer.push_back(core::to_accumulation(value));
    runs.push_back(outer);
  }
  EXPECT(runs[0] == runs[1], "%s conv %d: the order of units shows", name, number);
}

int main() {
  for (cpu::Capability capability : {cpu::Capability::kPortable, cpu::Capability::kAvx2, cpu::Capability::kAvx512}) {
    if (capability > cpu::capability()) continue;  // a lesser machine, or GHOSTGRAD_CPU_CAPABILITY
    for (const convolutions::Case& c : convolutions::kCases) {
      test_convolution<float>(capability, c);
      test_convolution<double>(capability, c);
      test_convolution<core::BFloat16>(capability, c);
      test_convolution<core::Float16>(capability, c);
    }
    const int64_t shapes[][4] = {{0, 3, 4, 5},     {2, 0, 4, 5},   {2, 3, 0, 5},     {2, 3, 4, 0},
                                 {1, 1, 1, 1},     {2, 5, 33, 13}, {3, 17, 31, 25},  {2, 64, 48, 36},
                                 {1, 300, 20, 10}, {70, 2, 9, 7},  {1, 4, 270, 300}, {1100, 2, 2, 3}};
    for (const auto& shape : shapes) {
      for (int64_t pad : {0, 3}) {
        test<float>(capability, shape[0], shape[1], shape[2], shape[3], pad);
        test<double>(capability, shape[0], shape[1], shape[2], shape[3], pad);
        test<core::BFloat16>(capability, shape[0], shape[1], shape[2], shape[3], pad);
        test<core::Float16>(capability, shape[0], shape[1], shape[2], shape[3], pad);
      }
    }
  }
  return failures;
}
