// The CPU kernels of every instruction set that this machine has, against loops in long double, with threads that come
// in any order.
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <map>
#include <random>
#include <vector>

#include "convolutions.h"
#include "cpu/ops.h"
#include "dtypes.h"
#include "expect.h"

using namespace ghostgrad;

// One unit at a time, the last one first: what a thread pool might do at its worst.
static cpu::ParallelFor backwards() {
  return cpu::ParallelFor{[](int64_t count, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
    for (int64_t unit = count; unit-- > 0;) body(unit, unit + 1, context);
  }};
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
  const core::Operands operands{a.data(),      b.data(), kDType<S>,     B,      T, p, d,
                                T * (p + pad), p + pad,  T * (d + pad), d + pad};

  std::vector<long double> wgrad(static_cast<size_t>(d * p)), scale(wgrad), sum(wgrad), sum_scale(wgrad),
      squares(wgrad), square_scale(wgrad), sqnorm(static_cast<size_t>(B));
  for (int64_t i = 0; i < B; ++i) {
    for (int64_t r = 0; r < d; ++r) {
      for (int64_t c = 0; c < p; ++c) {
        long double element = 0, magnitude = 0;
        for (int64_t t = 0; t < T; ++t) {
          const long double term =
              static_cast<long double>(core::to_accumulation(a[static_cast<size_t>((i * T + t) * (p + pad) + c)])) *
              core::to_accumulation(b[static_cast<size_t>((i * T + t) * (d + pad) + r)]);
          element += term;
          magnitude += std::fabs(term);
        }
        const size_t at = static_cast<size_t>(r * p + c);
        sqnorm[static_cast<size_t>(i)] += element * element;
        wgrad[at] += weights[static_cast<size_t>(i)] * element;
        scale[at] += std::fabs(weights[static_cast<size_t>(i)]) * magnitude;
        sum[at] += element;
        sum_scale[at] += magnitude;
        squares[at] += element * element;
        square_scale[at] += magnitude * magnitude;
      }
    }
  }

  const char* name = cpu::name_of(capability);
  std::vector<A> forwards_norms, backwards_norms;
  for (const cpu::ParallelFor& parallel : {cpu::serial(), backwards()}) {
    std::vector<A> outer(static_cast<size_t>(B), A(-1)), gram = outer, fused = outer;
    std::vector<A> moments = outer, square_sums(static_cast<size_t>(d * p), A(-1));
    std::vector<S> product(static_cast<size_t>(d * p)), sums(product);
    cpu::outer_sqnorm(operands, outer.data(), parallel, capability);
    cpu::gram_sqnorm(operands, gram.data(), parallel, capability);
    cpu::wgrad_sqnorm(operands, weights.data(), product.data(), fused.data(), parallel, capability);
    cpu::wgrad_moments(operands, sums.data(), square_sums.data(), moments.data(), parallel, capability);
    for (size_t i = 0; i < outer.size(); ++i) {
      EXPECT(close(outer[i], sqnorm[i], sqnorm[i], epsilon), "%s outer (%ld, %ld, %ld, %ld)", name, B, T, p, d);
      EXPECT(close(gram[i], sqnorm[i], sqnorm[i] + 1e-3L, 20 * epsilon), "%s gram (%ld, %ld, %ld, %ld)", name, B, T, p,
             d);
      EXPECT(close(fused[i], sqnorm[i], sqnorm[i], epsilon), "%s fused (%ld, %ld, %ld, %ld)", name, B, T, p, d);
      EXPECT(close(moments[i], sqnorm[i], sqnorm[i], epsilon), "%s moments (%ld, %ld, %ld, %ld)", name, B, T, p, d);
    }
    for (size_t e = 0; e < product.size(); ++e) {
      EXPECT(close(core::to_accumulation(product[e]), wgrad[e], scale[e], store_epsilon),
             "%s wgrad (%ld, %ld, %ld, %ld)", name, B, T, p, d);
      EXPECT(close(core::to_accumulation(sums[e]), sum[e], sum_scale[e], store_epsilon),
             "%s sum of moments (%ld, %ld, %ld, %ld)", name, B, T, p, d);
      EXPECT(close(square_sums[e], squares[e], square_scale[e], 2 * epsilon), "%s squares (%ld, %ld, %ld, %ld)", name,
             B, T, p, d);
    }
    std::vector<A>& norms = forwards_norms.empty() ? forwards_norms : backwards_norms;
    norms = outer;
    norms.insert(norms.end(), gram.begin(), gram.end());
    norms.insert(norms.end(), square_sums.begin(), square_sums.end());
    for (const auto* of : {&product, &sums}) {
      for (const S& value : *of) norms.push_back(core::to_accumulation(value));
    }
  }
  EXPECT(forwards_norms == backwards_norms || B * d * p == 0, "%s: the order of units shows", name);

  const core::Rows rows{a.data(), kDType<S>, B, T * p, T * (p + pad)};
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

// Tokens drawn from `vocabulary` of them, spread over all of int64 or int32, about one in eight negative.
template <class S, class Index>
static void test_embedding(cpu::Capability capability, int64_t B, int64_t T, int64_t d, int64_t vocabulary) {
  using A = core::accumulation_t<S>;
  const std::vector<S> b = draw<S>(B * T * (d + 3), 1);
  std::mt19937_64 generator(2);
  std::vector<Index> tokens(static_cast<size_t>(vocabulary)), index(static_cast<size_t>(B * T * 2 + 1));
  for (Index& token : tokens) {
    token = static_cast<Index>(generator());
    if (token < 0 && generator() % 4 != 0) token = static_cast<Index>(-(token + 1));
  }
  for (Index& token : index) token = tokens[generator() % tokens.size()];
  const core::Picks picks{index.data(), sizeof(Index) == 8, b.data(), kDType<S>, B, T, d, 2 * T, 2, T * (d + 3), d + 3};

  std::vector<A> forwards(static_cast<size_t>(B), A(-1)), result = forwards;
  cpu::embedding_sqnorm(picks, forwards.data(), cpu::serial(), capability);
  cpu::embedding_sqnorm(picks, result.data(), backwards(), capability);
  EXPECT(forwards == result, "%s: the order of units shows", cpu::name_of(capability));
  for (int64_t i = 0; i < B; ++i) {
    std::map<int64_t, std::vector<long double>> rows;
    for (int64_t t = 0; t < T; ++t) {
      const int64_t token = picks.token(i, t);
      if (token < 0) continue;
      std::vector<long double>& row = rows[token];
      row.resize(static_cast<size_t>(d));
      for (size_t j = 0; j < row.size(); ++j) {
        row[j] += core::to_accumulation(b[static_cast<size_t>((i * T + t) * (d + 3)) + j]);
      }
    }
    long double truth = 0;
    for (const auto& [token, row] : rows) {
      for (long double value : row) truth += value * value;
    }
    EXPECT(close(result[static_cast<size_t>(i)], truth, truth, sizeof(A) == 8 ? 1e-14 : 2e-6),
           "%s embedding (%ld, %ld, %ld, %ld): %g, not %Lg", cpu::name_of(capability), B, T, d, vocabulary,
           static_cast<double>(result[static_cast<size_t>(i)]), truth);
  }
}

template <class S>
static void test_embeddings(cpu::Capability capability) {
  const int64_t shapes[][4] = {{0, 3, 4, 2},    {2, 0, 4, 2},     {2, 3, 0, 2},       {3, 1, 5, 9},
                               {2, 17, 33, 5},  {2, 256, 7, 1},   {2, 257, 7, 1},     {1, 1030, 40, 2},
                               {2, 9, 1025, 3}, {1, 700, 65, 90}, {3, 300, 70, 4000}, {40, 12, 16, 6}};
  for (const auto& shape : shapes) {
    test_embedding<S, int64_t>(capability, shape[0], shape[1], shape[2], shape[3]);
    test_embedding<S, int32_t>(capability, shape[0], shape[1], shape[2], shape[3]);
  }
}

// affine_sqnorm in either order of memory, without statistics, with those of groups, and without x.
template <class S>
static void test_affine(cpu::Capability capability, int64_t B, int64_t T, int64_t d, int64_t N, int64_t G,
                        int64_t pad) {
  using A = core::accumulation_t<S>;
  const double epsilon = sizeof(A) == 8 ? 1e-14 : 2e-6;
  const bool last = N == 1;  // the channels are adjacent, else the positions after them
  const int64_t row = (last ? d : N) + pad, rows = last ? T : T * d;
  const std::vector<S> b = draw<S>(B * rows * row, 1), x = draw<S>(B * rows * row, 2);
  const std::vector<A> mean = draw<A>(B * T * G, 3), rstd = draw<A>(B * T * G, 4);
  for (int form = 0; form < 4; ++form) {  // no x, x, x and rstd, x and both
    const core::Affine affine{b.data(),
                              form > 0,
                              x.data(),
                              form > 2 ? mean.data() : nullptr,
                              form > 1 ? rstd.data() : nullptr,
                              kDType<S>,
                              B,
                              T,
                              d,
                              N,
                              G,
                              rows * row,
                              last ? row : d * row,
                              last ? 1 : row,
                              rows * row,
                              last ? row : d * row,
                              last ? 1 : row,
                              T * G,
                              G,
                              1,
                              T * G,
                              G,
                              1};
    const size_t channels = static_cast<size_t>(d), samples = static_cast<size_t>(B);
    std::vector<long double> total[2], sqnorm[2], scale[2], square_scale[2];
    for (int k = 0; k < 2; ++k) {
      total[k].resize(channels);
      scale[k].resize(channels);
      sqnorm[k].resize(samples);
      square_scale[k].resize(samples);
    }
    for (int64_t i = 0; i < B; ++i) {
      for (int64_t c = 0; c < d; ++c) {
        long double sum[2] = {0, 0}, magnitude[2] = {0, 0};
        for (int64_t t = 0; t < T; ++t) {
          for (int64_t n = 0; n < N; ++n) {
            const size_t at = static_cast<size_t>(i * rows * row + (last ? t * row + c : (t * d + c) * row + n));
            const size_t of_group = static_cast<size_t>((i * T + t) * G + c * G / d);
            const long double gradient = core::to_accumulation(b[at]);
            long double value = core::to_accumulation(x[at]), size = std::fabs(value);
            if (form > 2) size += std::fabs(mean[of_group]), value -= mean[of_group];
            if (form > 1) size *= std::fabs(rstd[of_group]), value *= rstd[of_group];
            sum[0] += gradient * value;
            sum[1] += gradient;
            magnitude[0] += std::fabs(gradient) * size;
            magnitude[1] += std::fabs(gradient);
          }
        }
        for (int k = 0; k < 2; ++k) {
          total[k][static_cast<size_t>(c)] += sum[k];
          scale[k][static_cast<size_t>(c)] += magnitude[k];
          sqnorm[k][static_cast<size_t>(i)] += sum[k] * sum[k];
          square_scale[k][static_cast<size_t>(i)] += 2 * magnitude[k] * magnitude[k];
        }
      }
    }
    std::vector<A> first;
    for (const cpu::ParallelFor& parallel : {cpu::serial(), backwards()}) {
      std::vector<A> sums[2], norms[2], alone[2];
      for (int k = 0; k < 2; ++k) {
        sums[k].assign(channels, A(-1));
        norms[k].assign(samples, A(-1));
        alone[k].assign(samples, A(-1));
      }
      cpu::affine_sqnorm(affine, core::AffineResults{sums[0].data(), norms[0].data(), sums[1].data(), norms[1].data()},
                         parallel, capability);
      cpu::affine_sqnorm(affine, core::AffineResults{nullptr, alone[0].data(), nullptr, alone[1].data()}, parallel,
                         capability);
      std::vector<A> all;
      for (int k = form > 0 ? 0 : 1; k < 2; ++k) {
        EXPECT(alone[k] == norms[k] || d == 0, "%s: the norms alone differ", cpu::name_of(capability));
        for (size_t c = 0; c < channels; ++c) {
          EXPECT(close(sums[k][c], total[k][c], scale[k][c], epsilon), "%s affine %d (%ld, %ld, %ld, %ld, %ld)",
                 cpu::name_of(capability), form, B, T, d, N, G);
        }
        for (size_t i = 0; i < samples; ++i) {
          EXPECT(close(norms[k][i], sqnorm[k][i], square_scale[k][i], epsilon),
                 "%s affine %d (%ld, %ld, %ld, %ld, %ld)", cpu::name_of(capability), form, B, T, d, N, G);
        }
        all.insert(all.end(), sums[k].begin(), sums[k].end());
        all.insert(all.end(), norms[k].begin(), norms[k].end());
      }
      if (first.empty()) first = all;
      EXPECT(first == all, "%s: the order of units shows", cpu::name_of(capability));
    }
  }
}

template <class S>
static void test_convolution(cpu::Capability capability, const convolutions::Case& c) {
  using A = core::accumulation_t<S>;
  const double epsilon = sizeof(A) == 8 ? 1e-13 : 1e-5, store_epsilon = sizeof(S) == 2 ? 1e-2 : epsilon;
  core::Convolution o = convolutions::convolution(c, kDType<S>);
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
  for (cpu::Capability capability :
       {cpu::Capability::kPortable, cpu::Capability::kAvx2, cpu::Capability::kAvx512, cpu::Capability::kAvx512Bf16}) {
    if (capability > cpu::capability()) continue;  // a lesser machine, or GHOSTGRAD_CPU_CAPABILITY
    test_embeddings<float>(capability);
    test_embeddings<double>(capability);
    test_embeddings<core::BFloat16>(capability);
    test_embeddings<core::Float16>(capability);
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
    const int64_t affine_shapes[][5] = {{0, 3, 4, 1, 2},   {2, 0, 4, 1, 2},   {2, 3, 0, 1, 1},   {2, 1, 4, 0, 2},
                                        {1, 1, 1, 1, 1},   {3, 1, 17, 1, 1},  {2, 7, 65, 1, 5},  {2, 260, 9, 1, 1},
                                        {35, 2, 12, 1, 3}, {3, 5, 600, 1, 1}, {2, 1, 12, 35, 4}, {3, 2, 3, 300, 1},
                                        {1, 1, 2, 4200, 2}};
    for (const auto& shape : affine_shapes) {
      for (int64_t pad : {0, 3}) {
        test_affine<float>(capability, shape[0], shape[1], shape[2], shape[3], shape[4], pad);
        test_affine<double>(capability, shape[0], shape[1], shape[2], shape[3], shape[4], pad);
        test_affine<core::BFloat16>(capability, shape[0], shape[1], shape[2], shape[3], shape[4], pad);
        test_affine<core::Float16>(capability, shape[0], shape[1], shape[2], shape[3], shape[4], pad);
      }
    }
  }
  return failures;
}
