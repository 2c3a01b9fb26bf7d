// The CUDA kernels, run on the CPU by emulation/cuda_runtime_api.h, against the CPU kernels. In three orders of threads
// and with fewer blocks than units: same bits.
#include <cmath>
#include <initializer_list>
#include <random>
#include <vector>

#include "../core/convolutions.h"
#include "../core/expect.h"
#include "cpu/ops.h"
#include "cuda/affine_sqnorm.h"
#include "cuda/conv_sqnorm.h"
#include "cuda/conv_wgrad_sqnorm.h"
#include "cuda/embedding_sqnorm.h"
#include "cuda/gram_sqnorm.h"
#include "cuda/outer_sqnorm.h"
#include "cuda/row_sqnorm.h"
#include "cuda/wgrad_moments.h"
#include "cuda/wgrad_sqnorm.h"

using namespace ghostgrad;

template <class S>
constexpr core::DType kDType = core::DType::kFloat32;
template <>
constexpr core::DType kDType<double> = core::DType::kFloat64;
template <>
constexpr core::DType kDType<core::BFloat16> = core::DType::kBFloat16;
template <>
constexpr core::DType kDType<core::Float16> = core::DType::kFloat16;

template <class S>
static std::vector<S> draw(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<S> values(static_cast<size_t>(count) + 1);
  for (S& value : values) value = core::from_accumulation<S>(static_cast<core::accumulation_t<S>>(uniform(generator)));
  return values;
}

// Device memory full of NaN, so that what is read before it is written shows.
static std::vector<double> workspace(int64_t bytes) {
  return std::vector<double>(static_cast<size_t>(bytes / 8 + 1), NAN);
}

struct Way {
  emulation::Order order;
  int64_t max_blocks;
};
constexpr Way kWays[] = {{emulation::Order::kForwards, INT64_MAX},
                         {emulation::Order::kBackwards, 2},
                         {emulation::Order::kShuffled, INT64_MAX}};

template <class S>
struct Results {
  std::vector<core::accumulation_t<S>> outer, gram, fused, row;
  std::vector<S> wgrad;

  explicit Results(int64_t B, int64_t elements)
      : outer(static_cast<size_t>(B), NAN),
        gram(outer),
        fused(outer),
        row(outer),
        wgrad(static_cast<size_t>(elements)) {}

  std::vector<double> all() const {
    std::vector<double> values;
    for (const auto* norms : {&outer, &gram, &fused, &row}) values.insert(values.end(), norms->begin(), norms->end());
    for (const S& value : wgrad) values.push_back(core::to_accumulation(value));
    return values;
  }
};

template <class S>
static void test(int64_t B, int64_t T, int64_t p, int64_t d, bool weighted) {
  using A = core::accumulation_t<S>;
  const int64_t pad = 3;
  const std::vector<S> a = draw<S>(B * T * (p + pad), 1), b = draw<S>(B * T * (d + pad), 2);
  const std::vector<A> weights = draw<A>(B, 3);
  const A* c = weighted ? weights.data() : nullptr;
  const core::Operands o{a.data(), b.data(), kDType<S>, B, T, p, d, T * (p + pad), p + pad, T * (d + pad), d + pad};
  const core::Rows rows{a.data(), kDType<S>, B, T * p, T * (p + pad)};

  Results<S> truth(B, d * p);
  const cpu::Capability capability = cpu::capability();
  cpu::outer_sqnorm(o, truth.outer.data(), cpu::serial(), capability);
  cpu::gram_sqnorm(o, truth.gram.data(), cpu::serial(), capability);
  cpu::wgrad_sqnorm(o, c, truth.wgrad.data(), truth.fused.data(), cpu::serial(), capability);
  cpu::row_sqnorm(rows, truth.row.data(), cpu::serial(), capability);

  std::vector<double> first;
  for (const Way& way : kWays) {
    emulation::order = way.order;
    emulation::max_blocks = way.max_blocks;
    Results<S> got(B, d * p);
    EXPECT(cuda::launch_outer_sqnorm(o, got.outer.data(), workspace(cuda::outer_sqnorm_workspace(o)).data(), nullptr) ==
           cudaSuccess);
    EXPECT(cuda::launch_gram_sqnorm(o, got.gram.data(), workspace(cuda::gram_sqnorm_workspace(o)).data(), nullptr) ==
           cudaSuccess);
    EXPECT(cuda::launch_wgrad_sqnorm(o, c, got.wgrad.data(), got.fused.data(),
                                     workspace(cuda::wgrad_sqnorm_workspace(o)).data(), nullptr) == cudaSuccess);
    std::vector<S> sums(static_cast<size_t>(d * p)), true_sums(sums);
    std::vector<A> squares(sums.size(), NAN), true_squares(squares), norms(truth.fused.size(), NAN), true_norms(norms);
    cpu::wgrad_moments(o, true_sums.data(), true_squares.data(), true_norms.data(), cpu::serial(), capability);
    EXPECT(cuda::launch_wgrad_moments(o, sums.data(), squares.data(), norms.data(),
                                      workspace(cuda::wgrad_moments_workspace(o)).data(), nullptr) == cudaSuccess);
    const auto expect_close = [&](const auto& values, const auto& trues, double relative, const char* what) {
      double largest = 1e-30;
      for (const auto& value : trues) largest = std::fmax(largest, std::fabs(core::to_accumulation(value)));
      for (size_t e = 0; e < values.size(); ++e) {
        const double value = core::to_accumulation(values[e]), true_value = core::to_accumulation(trues[e]);
        EXPECT(std::fabs(value - true_value) <= relative * largest, "(%ld, %ld, %ld, %ld) %s %zu: %g, not %g", B, T, p,
               d, what, e, value, true_value);
      }
    };
    expect_close(sums, true_sums, sizeof(S) == 8 ? 1e-13 : sizeof(S) == 4 ? 1e-5 : 1e-2, "sum of moments");
    expect_close(squares, true_squares, sizeof(A) == 8 ? 1e-12 : 2e-5, "square of moments");
    expect_close(norms, true_norms, sizeof(A) == 8 ? 1e-12 : 2e-5, "norm of moments");
    EXPECT(cuda::launch_row_sqnorm(rows, got.row.data(), workspace(cuda::row_sqnorm_workspace(rows)).data(), nullptr) ==
           cudaSuccess);
    const std::vector<double> values = got.all(), truths = truth.all();
    double scale = 1e-30;
    for (size_t i = 4 * static_cast<size_t>(B); i < truths.size(); ++i) scale = std::fmax(scale, std::fabs(truths[i]));
    for (size_t i = 0; i < values.size(); ++i) {
      const bool norm = i < 4 * static_cast<size_t>(B);
      const double tolerance = norm ? (sizeof(A) == 8 ? 1e-12 : 2e-5) * std::fabs(truths[i])
                                    : (sizeof(S) == 8   ? 1e-13
                                       : sizeof(S) == 4 ? 1e-5
                                                        : 1e-2) *
                                          scale;
      EXPECT(std::fabs(values[i] - truths[i]) <= tolerance, "(%ld, %ld, %ld, %ld) element %zu: %g, not %g", B, T, p, d,
             i, values[i], truths[i]);
    }
    if (first.empty()) first = values;
    EXPECT(first == values, "(%ld, %ld, %ld, %ld): the order of threads or the number of blocks shows", B, T, p, d);
    if (failures > 20) return;
  }
}

// Tokens drawn from `vocabulary` of them, the first of which is negative; with one more, all are equal.
template <class S, class Index>
static void test_embedding(int64_t B, int64_t T, int64_t d, int64_t vocabulary) {
  using A = core::accumulation_t<S>;
  const int64_t pad = 3;
  const std::vector<S> b = draw<S>(B * T * (d + pad), 1);
  std::mt19937_64 generator(2);
  std::vector<Index> index(static_cast<size_t>(B * T * 2 + 1));
  for (Index& token : index) {
    token = static_cast<Index>(static_cast<int64_t>(generator() % static_cast<uint64_t>(vocabulary)) - 1);
    if (token > 0) token = static_cast<Index>(token * (sizeof(Index) == 8 ? 0x123456789abcd : 12345));
    if (vocabulary == 1) token = 7;
  }
  const core::Picks picks{index.data(), sizeof(Index) == 8, b.data(), kDType<S>, B, T, d, 2 * T, 2, T * (d + pad),
                          d + pad};
  std::vector<A> truth(static_cast<size_t>(B), NAN), first;
  cpu::embedding_sqnorm(picks, truth.data(), cpu::serial(), cpu::capability());
  for (const Way& way : kWays) {
    emulation::order = way.order;
    emulation::max_blocks = way.max_blocks;
    std::vector<A> got(static_cast<size_t>(B), NAN);
    EXPECT(cuda::launch_embedding_sqnorm(picks, got.data(), workspace(cuda::embedding_sqnorm_workspace(picks)).data(),
                                         nullptr) == cudaSuccess);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT(std::fabs(got[i] - truth[i]) <= (sizeof(A) == 8 ? 1e-13 : 1e-6) * truth[i],
             "embedding (%ld, %ld, %ld, %ld) sample %zu: %g, not %g", B, T, d, vocabulary, i,
             static_cast<double>(got[i]), static_cast<double>(truth[i]));
    }
    if (first.empty()) first = got;
    EXPECT(first == got, "embedding (%ld, %ld, %ld): the order of threads or the number of blocks shows", B, T, d);
  }
}

static void test_embeddings() {
  const int64_t shapes[][4] = {{0, 3, 4, 5},     {2, 0, 4, 5},    {2, 3, 0, 5},     {3, 1, 5, 2},
                               {2, 63, 129, 10}, {2, 64, 128, 4}, {5, 65, 7, 1000}, {2, 300, 4, 1},
                               {2, 700, 33, 6},  {1, 2048, 3, 9}, {2, 2049, 3, 900}};
  for (const auto& shape : shapes) {
    test_embedding<float, int64_t>(shape[0], shape[1], shape[2], shape[3]);
    test_embedding<double, int32_t>(shape[0], shape[1], shape[2], shape[3]);
  }
  test_embedding<core::BFloat16, int32_t>(3, 50, 40, 20);
  test_embedding<core::Float16, int64_t>(3, 50, 40, 20);
}

// affine_sqnorm with everything it takes, and without x and totals.
template <class S>
static void test_affine(int64_t B, int64_t T, int64_t d, int64_t N, int64_t G) {
  using A = core::accumulation_t<S>;
  const bool last = N == 1;
  const int64_t pad = 3, row = (last ? d : N) + pad, rows = last ? T : T * d;
  const std::vector<S> b = draw<S>(B * rows * row, 1), x = draw<S>(B * rows * row, 2);
  const std::vector<A> mean = draw<A>(B * T * G, 3), rstd = draw<A>(B * T * G, 4);
  const int64_t before = last ? row : d * row, channel = last ? 1 : row;
  for (bool scaled : {true, false}) {
    const core::Affine affine{b.data(),    scaled,    x.data(),   scaled ? mean.data() : nullptr,
                              rstd.data(), kDType<S>, B,          T,
                              d,           N,         G,          rows * row,
                              before,      channel,   rows * row, before,
                              channel,     T * G,     G,          1,
                              T * G,       G,         1};
    const size_t channels = static_cast<size_t>(d), samples = static_cast<size_t>(B);
    std::vector<A> first;
    const auto results_in = [&](std::vector<A>& memory) {
      memory.assign(2 * (channels + samples), A(0));
      A* at = memory.data();
      return core::AffineResults{scaled ? at : nullptr, at + channels, scaled ? at + channels + samples : nullptr,
                                 at + 2 * channels + samples};
    };
    std::vector<A> truth;
    cpu::affine_sqnorm(affine, results_in(truth), cpu::serial(), cpu::capability());
    for (emulation::Order order :
         {emulation::Order::kForwards, emulation::Order::kBackwards, emulation::Order::kShuffled}) {
      emulation::order = order;
      emulation::max_blocks = order == emulation::Order::kBackwards ? 2 : INT64_MAX;
      std::vector<A> got;
      const core::AffineResults results = results_in(got);
      EXPECT(cuda::launch_affine_sqnorm(affine, results, workspace(cuda::affine_sqnorm_workspace(affine)).data(),
                                        nullptr) == cudaSuccess);
      const double tolerance = (sizeof(A) == 8 ? 1e-13 : 1e-5) * static_cast<double>(T * N);
      for (size_t e = 0; e < got.size(); ++e) {
        EXPECT(std::fabs(static_cast<double>(got[e] - truth[e])) <=
                   tolerance * (1 + std::fabs(static_cast<double>(truth[e]))),
               "affine (%ld, %ld, %ld, %ld, %ld) element %zu: %g, not %g", B, T, d, N, G, e,
               static_cast<double>(got[e]), static_cast<double>(truth[e]));
      }
      if (first.empty()) first = got;
      EXPECT(first == got, "affine (%ld, %ld, %ld, %ld, %ld): the order of threads or the number of blocks shows", B, T,
             d, N, G);
    }
  }
}

// An infinity in the corner of one sample, next to the padding: that sample's norm is infinite, not NaN, and no other
// knows.
static void test_infinity() {
  const int64_t B = 3, T = 5, p = 70, d = 66;
  std::vector<float> a = draw<float>(B * T * p, 1), b = draw<float>(B * T * d, 2);
  for (float& value : b) value = std::fabs(value) + 0.5f;  // inf * b is inf
  a[static_cast<size_t>(2 * T * p - 1)] = INFINITY;        // the last feature of the last position of sample 1
  const core::Operands o{a.data(), b.data(), core::DType::kFloat32, B, T, p, d, T * p, p, T * d, d};
  std::vector<float> outer(3), fused(3), wgrad(static_cast<size_t>(d * p));
  EXPECT(cuda::launch_outer_sqnorm(o, outer.data(), workspace(cuda::outer_sqnorm_workspace(o)).data(), nullptr) ==
         cudaSuccess);
  EXPECT(cuda::launch_wgrad_sqnorm(o, nullptr, wgrad.data(), fused.data(),
                                   workspace(cuda::wgrad_sqnorm_workspace(o)).data(), nullptr) == cudaSuccess);
  for (const std::vector<float>& norms : {outer, fused}) {
    EXPECT(std::isinf(norms[1]), "%g", norms[1]);
    EXPECT(std::isfinite(norms[0]) && std::isfinite(norms[2]));
  }
}

template <class S>
static void test_convolution(const convolutions::Case& c) {
  using A = core::accumulation_t<S>;
  core::Convolution o = convolutions::convolution(c, kDType<S>);
  const std::vector<S> x = draw<S>(convolutions::x_elements(o), 1), b = draw<S>(convolutions::b_elements(o), 2);
  o.x = x.data();
  o.b = b.data();
  const size_t B = static_cast<size_t>(o.batch), elements = static_cast<size_t>(o.elements());
  std::vector<A> truth(B, NAN);
  std::vector<S> truth_wgrad(elements);
  cpu::conv_wgrad_sqnorm(o, truth_wgrad.data(), truth.data(), cpu::serial(), cpu::capability());
  double scale = 1e-30;
  for (const S& value : truth_wgrad) scale = std::fmax(scale, std::fabs(core::to_accumulation(value)));

  const int number = static_cast<int>(&c - convolutions::kCases);
  std::vector<double> first;
  for (const emulation::Order order :
       {emulation::Order::kForwards, emulation::Order::kBackwards, emulation::Order::kShuffled}) {
    emulation::order = order;
    emulation::max_blocks = order == emulation::Order::kBackwards ? 2 : INT64_MAX;
    std::vector<A> norms(B, NAN), fused(B, NAN);
    std::vector<S> wgrad(elements);
    EXPECT(cuda::launch_conv_sqnorm(o, norms.data(), workspace(cuda::conv_sqnorm_workspace(o)).data(), nullptr) ==
           cudaSuccess);
    EXPECT(cuda::launch_conv_wgrad_sqnorm(o, wgrad.data(), fused.data(),
                                          workspace(cuda::conv_wgrad_sqnorm_workspace(o)).data(),
                                          nullptr) == cudaSuccess);
    std::vector<double> values;
    for (size_t i = 0; i < B; ++i) {
      for (const A value : {norms[i], fused[i]}) {
        EXPECT(std::fabs(value - truth[i]) <= (sizeof(A) == 8 ? 1e-12 : 2e-5) * std::fabs(truth[i]),
               "convolution %d, sample %zu: %g, not %g", number, i, double(value), double(truth[i]));
        values.push_back(value);
      }
    }
    for (size_t e = 0; e < elements; ++e) {
      const double value = core::to_accumulation(wgrad[e]), true_value = core::to_accumulation(truth_wgrad[e]);
      EXPECT(std::fabs(value - true_value) <= (sizeof(S) == 8   ? 1e-13
                                               : sizeof(S) == 4 ? 1e-5
                                                                : 1e-2) *
                                                  scale,
             "convolution %d, element %zu: %g, not %g", number, e, value, true_value);
      values.push_back(value);
    }
    if (first.empty()) first = values;
    EXPECT(first == values, "convolution %d: the order of threads or the number of blocks shows", number);
    if (failures > 20) return;
  }
}

int main() {
  for (const convolutions::Case& c : convolutions::kCases) {
    if (c.batch > 100) continue;  // the emulation is slow
    test_convolution<float>(c);
    test_convolution<double>(c);
  }
  test_convolution<core::BFloat16>(convolutions::kCases[6]);
  test_convolution<core::Float16>(convolutions::kCases[10]);
  test_infinity();
  test_embeddings();
  const int64_t shapes[][4] = {{0, 3, 4, 5},    {2, 0, 4, 5},    {2, 3, 0, 5},    {2, 3, 4, 0},
                               {1, 1, 1, 1},    {2, 17, 65, 70}, {1, 64, 64, 64}, {2, 130, 5, 9},
                               {1, 300, 3, 66}, {70, 2, 3, 4},   {26, 40, 7, 70}};
  for (const auto& shape : shapes) {
    test<float>(shape[0], shape[1], shape[2], shape[3], true);
    test<double>(shape[0], shape[1], shape[2], shape[3], false);
  }
  test<core::BFloat16>(3, 20, 33, 66, true);
  test<core::Float16>(3, 20, 33, 66, false);
  test<float>(2, 1, 9000, 1, true);  // more than one piece of a row
  test<float>(9, 1, 9, 1, true);     // more rows than blocks, in one of the three ways
  const int64_t affine_shapes[][5] = {{0, 3, 4, 1, 2},   {2, 0, 4, 1, 2},   {2, 3, 0, 1, 1},   {2, 1, 4, 0, 2},
                                      {1, 1, 1, 1, 1},   {3, 1, 33, 1, 1},  {2, 20, 66, 1, 6}, {2, 1030, 3, 1, 1},
                                      {70, 2, 12, 1, 3}, {3, 2, 40, 35, 4}, {1, 1, 2, 2100, 2}};
  for (const auto& shape : affine_shapes) {
    test_affine<float>(shape[0], shape[1], shape[2], shape[3], shape[4]);
    test_affine<double>(shape[0], shape[1], shape[2], shape[3], shape[4]);
  }
  test_affine<core::BFloat16>(3, 20, 33, 1, 1);
  test_affine<core::Float16>(3, 1, 33, 20, 3);
  return failures;
}
