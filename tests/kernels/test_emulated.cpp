// The CUDA kernels, run on the CPU by emulation/, against the CPU kernels in float64: `test_emulated` tries every op,
// `test_emulated outer_sqnorm` one.
//
// Shapes are drawn around the sizes of tiles, from a seed. Operands, results and workspaces are as long as they must be
// and not an element longer, with NaN between rows and in everything that a kernel is to write. Each problem runs in
// three orders of threads, one of them with fewer blocks than units, and must give the same bits.
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../core/convolutions.h"
#include "../core/dtypes.h"
#include "../core/expect.h"
#include "core/tiles.h"
#include "cpu/ops.h"
#include "cuda/affine_sqnorm.h"
#include "cuda/conv_sqnorm.h"
#include "cuda/conv_wgrad_sqnorm.h"
#include "cuda/embedding_sqnorm.h"
#include "cuda/gram_sqnorm.h"
#include "cuda/norm_affine.h"
#include "cuda/outer_sqnorm.h"
#include "cuda/row_sqnorm.h"
#include "cuda/wgrad_moments.h"
#include "cuda/wgrad_sqnorm.h"

using namespace ghostgrad;

// --- operands and results ---

// Half the distance from 1 to the next larger number.
template <class S>
constexpr double kRounding = 0x1p-24;
template <>
constexpr double kRounding<double> = 0x1p-53;
template <>
constexpr double kRounding<core::BFloat16> = 0x1p-8;
template <>
constexpr double kRounding<core::Float16> = 0x1p-11;

// What sums of products may be off, relative to a norm or to the largest element of a matrix.
template <class S>
constexpr double kTolerance = sizeof(S) == 8 ? 1e-12 : 2e-5;

class Random {
 public:
  explicit Random(unsigned seed) : generator_(seed) {}

  int64_t below(int64_t limit) { return static_cast<int64_t>(generator_() % static_cast<uint64_t>(limit)); }
  bool chance(int64_t of) { return below(of) == 0; }
  template <class T, size_t kCount>
  T of(const T (&choices)[kCount]) {
    return choices[below(static_cast<int64_t>(kCount))];
  }
  // A size at or next to one that kernels are made for, and zero now and then.
  int64_t size(int64_t limit) {
    const int64_t near[] = {1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048};
    if (chance(24)) return 0;
    int64_t result = limit + 1;
    while (result > limit || result == 0) result = of(near) + below(3) - 1;
    return result;
  }
  template <class S>
  S value() {
    return core::from_accumulation<S>(
        static_cast<core::accumulation_t<S>>(std::uniform_real_distribution<float>(-1, 1)(generator_)));
  }

 private:
  std::mt19937_64 generator_;
};

// To eleven significant bits, to nearest, ties away from zero.
static double rounded_to_tf32(double value) {
  int exponent;
  const double mantissa = std::frexp(value, &exponent);
  return std::ldexp(std::round(std::ldexp(mantissa, 11)), exponent - 11);
}

// `count` elements from `offset` elements behind an address that is aligned to 16 bytes. NaN until they are set.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count, int64_t offset = 0)
      : count_(count), offset_(offset), memory_(new T[static_cast<size_t>(offset + count)]) {
    std::memset(static_cast<void*>(memory_.get()), 0xff, static_cast<size_t>(offset + count) * sizeof(T));
  }
  Buffer(Random& random, int64_t count, int64_t offset = 0) : Buffer(count, offset) {
    for (int64_t i = 0; i < count; ++i) (*this)[i] = random.value<T>();
  }
  T* data() { return memory_.get() + offset_; }
  const T* data() const { return memory_.get() + offset_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  int64_t count() const { return count_; }

  // As float64, rounded to tf32 before if so wished.
  Buffer<double> widened(bool tf32 = false) const {
    Buffer<double> result(count_);
    for (int64_t i = 0; i < count_; ++i) {
      const double value = static_cast<double>(core::to_accumulation((*this)[i]));
      result[i] = tf32 ? rounded_to_tf32(value) : value;
    }
    return result;
  }

 private:
  int64_t count_, offset_;
  std::unique_ptr<T[]> memory_;
};

// Device memory to work in: as many bytes as asked for, aligned to 8 and no more.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes, 8) {}
  void* data() { return bytes_.data(); }

 private:
  Buffer<unsigned char> bytes_;
};

// Where something starts, in elements: mostly where allocators put it, else anywhere.
static int64_t draw_offset(Random& random) { return random.chance(3) ? random.below(9) : 0; }

// Elements of a tensor of these sizes and strides.
static int64_t extent(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return last + 1;
}

// (batch, positions, features), features adjacent. Mostly what vectors of 16 bytes and the bulk copy engine take; else
// padded anyhow, anywhere, now and then expanded.
template <class S>
struct Tensor {
  bool vectors;
  int64_t position_stride, batch_stride;
  Buffer<S> values;

  Tensor(Random& random, int64_t B, int64_t T, int64_t n)
      : vectors(!random.chance(3)),
        position_stride(draw_stride(random, n)),
        batch_stride(draw_stride(random, T * position_stride)),
        values(extent({B, T, n}, {batch_stride, position_stride, 1}),
               vectors ? kVector * random.below(2) : random.below(9)) {
    for (int64_t i = 0; i < B; ++i) {
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t j = 0; j < n; ++j) values[i * batch_stride + t * position_stride + j] = random.value<S>();
      }
    }
  }

 private:
  static constexpr int64_t kVector = 16 / static_cast<int64_t>(sizeof(S));

  int64_t draw_stride(Random& random, int64_t length) const {
    if (random.chance(16)) return 0;
    const int64_t stride = length + (random.chance(2) ? random.of<int64_t>({1, 2, 3, 4, 8, 16, 61}) : 0);
    return vectors ? core::round_up(stride, kVector) : stride;
  }
};

template <class T>
static void append(std::vector<double>& to, const Buffer<T>& from) {
  for (int64_t i = 0; i < from.count(); ++i) to.push_back(static_cast<double>(core::to_accumulation(from[i])));
}

// --- comparison ---

struct Expected {
  std::vector<double> value, tolerance;

  template <class Tolerance>
  void add(const Buffer<double>& values, const Tolerance& tolerance_of) {
    for (int64_t i = 0; i < values.count(); ++i) {
      value.push_back(values[i]);
      tolerance.push_back(tolerance_of(values[i]));
    }
  }
  // Squared norms of gradients of operands of type S.
  template <class S>
  void add_norms(const Buffer<double>& norms) {
    add(norms, [](double norm) { return kTolerance<core::accumulation_t<S>> * norm; });
  }
  // A weight gradient, stored as S.
  template <class S>
  void add_wgrad(const Buffer<double>& wgrad) {
    double largest = 0;
    for (int64_t i = 0; i < wgrad.count(); ++i) largest = std::fmax(largest, std::fabs(wgrad[i]));
    add(wgrad, [largest](double element) {
      return kRounding<S> * std::fabs(element) + kTolerance<core::accumulation_t<S>> / 2 * largest;
    });
  }
};

struct Way {
  emulation::Order order;
  int64_t max_blocks;
};
#if defined(__SANITIZE_ADDRESS__)
constexpr Way kWays[] = {
    {emulation::Order::kShuffled, 3}};  // the sanitizers look at addresses, in a tenth of the speed
#else
constexpr Way kWays[] = {{emulation::Order::kForwards, INT64_MAX},
                         {emulation::Order::kBackwards, 2},
                         {emulation::Order::kShuffled, INT64_MAX}};
#endif

static int problems = 0;

// run(results) launches what is tested and appends its results.
template <class Run>
static void check(const std::string& name, const Expected& expected, const Run& run) {
  ++problems;
  std::vector<double> first;
  for (const Way& way : kWays) {
    emulation::order = way.order;
    emulation::max_blocks = way.max_blocks;
    std::vector<double> got;
    EXPECT(run(got) == cudaSuccess, "%s", name.c_str());
    EXPECT(got.size() == expected.value.size(), "%s: %zu results", name.c_str(), got.size());
    const int before = failures;
    for (size_t i = 0; i < expected.value.size() && failures < before + 3; ++i) {
      EXPECT(std::fabs(got[i] - expected.value[i]) <= expected.tolerance[i], "%s, result %zu of %zu: %.9g, not %.9g",
             name.c_str(), i, got.size(), got[i], expected.value[i]);
    }
    if (first.empty()) first = got;
    EXPECT(first.size() == got.size() &&
               (got.empty() || std::memcmp(first.data(), got.data(), got.size() * sizeof(double)) == 0),
           "%s: the order of threads or the number of blocks shows", name.c_str());
  }
}

static std::string text(const char* op, core::DType dtype, std::initializer_list<int64_t> sizes) {
  const char* names[] = {"float32", "float64", "bfloat16", "float16"};
  std::string result = std::string(op) + " " + names[static_cast<int>(dtype)];
  for (int64_t size : sizes) result += " " + std::to_string(size);
  return result;
}

// --- products: outer_sqnorm, gram_sqnorm, wgrad_sqnorm, wgrad_moments ---

// Half of those in float32 may be rounded to tf32. Then so are the operands of the truth.
template <class S>
static bool draw_tf32(Random& random) {
  return std::is_same_v<S, float> && random.chance(2);
}

template <class S>
struct Product {
  int64_t B, T, p, d;
  bool tf32;
  Tensor<S> a, b;
  Buffer<double> wide_a, wide_b;

  Product(Random& random, int64_t B_, int64_t T_, int64_t p_, int64_t d_)
      : B(B_),
        T(T_),
        p(p_),
        d(d_),
        tf32(draw_tf32<S>(random)),
        a(random, B, T, p),
        b(random, B, T, d),
        wide_a(a.values.widened(tf32)),
        wide_b(b.values.widened(tf32)) {
    emulation::hopper = random.chance(2);
  }

  core::Operands operands() const { return with(a.values.data(), b.values.data(), kDType<S>); }
  core::Operands wide() const { return with(wide_a.data(), wide_b.data(), core::DType::kFloat64); }
  std::string name(const char* op) const {
    return text(
        op, kDType<S>,
        {B, T, p, d, a.batch_stride, a.position_stride, b.batch_stride, b.position_stride, tf32, emulation::hopper});
  }

 private:
  core::Operands with(const void* a_data, const void* b_data, core::DType dtype) const {
    return core::Operands{
        a_data, b_data, dtype, B, T, p, d, a.batch_stride, a.position_stride, b.batch_stride, b.position_stride, tf32};
  }
};

struct Sizes {
  int64_t B, T, p, d;
};
// Many samples, long sums and runs of samples first; then any.
static Sizes draw_sizes(Random& random, int number) {
  const Sizes always[] = {{70, 2, 3, 4}, {26, 40, 7, 70}, {1, 300, 3, 66}, {2, 130, 5, 9}, {2, 0, 4, 5}, {0, 3, 4, 5}};
  if (number < 6) return always[number];
  Sizes s{};
  do {
    s = {random.of<int64_t>({1, 1, 2, 3, 5, 33}), random.size(300), random.size(300), random.size(300)};
  } while (s.B * s.T * s.p * s.d > 1500000 || (s.T == 0) + (s.p == 0) + (s.d == 0) > 1);
  return s;
}

template <class S>
static Product<S> draw_product(Random& random, int number) {
  const Sizes s = draw_sizes(random, number);
  return Product<S>(random, s.B, s.T, s.p, s.d);
}

// Both formulas, against the one of the CPU that materialises tiles.
template <class S>
static void test_norms(Random& random, int number, const char* op, int64_t (*workspace)(const core::Operands&),
                       cudaError_t (*launch)(const core::Operands&, void*, void*, cudaStream_t)) {
  using A = core::accumulation_t<S>;
  const Product<S> product = draw_product<S>(random, number);
  Buffer<double> truth(product.B);
  cpu::outer_sqnorm(product.wide(), truth.data(), cpu::serial(), cpu::capability());
  Expected expected;
  expected.add_norms<S>(truth);
  check(product.name(op), expected, [&](std::vector<double>& results) {
    const core::Operands o = product.operands();
    Buffer<A> norms(o.batch);
    const cudaError_t error = launch(o, norms.data(), Workspace(workspace(o)).data(), nullptr);
    append(results, norms);
    return error;
  });
}
template <class S>
static void test_outer_sqnorm(Random& random, int number) {
  test_norms<S>(random, number, "outer_sqnorm", cuda::outer_sqnorm_workspace, cuda::launch_outer_sqnorm);
}
template <class S>
static void test_gram_sqnorm(Random& random, int number) {
  test_norms<S>(random, number, "gram_sqnorm", cuda::gram_sqnorm_workspace, cuda::launch_gram_sqnorm);
}

template <class S>
static void test_wgrad_sqnorm(Random& random, int number) {
  using A = core::accumulation_t<S>;
  const Product<S> product = draw_product<S>(random, number);
  const bool weighted = random.chance(2);
  const Buffer<A> weights(random, weighted ? product.B : 0);
  const Buffer<double> wide_weights = weights.widened();
  Buffer<double> truth(product.B), true_wgrad(product.d * product.p);
  cpu::wgrad_sqnorm(product.wide(), weighted ? wide_weights.data() : nullptr, true_wgrad.data(), truth.data(),
                    cpu::serial(), cpu::capability());
  Expected expected;
  expected.add_norms<S>(truth);
  expected.add_wgrad<S>(true_wgrad);
  check(product.name(weighted ? "wgrad_sqnorm weighted" : "wgrad_sqnorm"), expected, [&](std::vector<double>& results) {
    const core::Operands o = product.operands();
    Buffer<A> norms(o.batch);
    Buffer<S> wgrad(o.out_features * o.in_features);
    const cudaError_t error =
        cuda::launch_wgrad_sqnorm(o, weighted ? weights.data() : nullptr, wgrad.data(), norms.data(),
                                  Workspace(cuda::wgrad_sqnorm_workspace(o)).data(), nullptr);
    append(results, norms);
    append(results, wgrad);
    return error;
  });
}

template <class S>
static void test_wgrad_moments(Random& random, int number) {
  using A = core::accumulation_t<S>;
  const Product<S> product = draw_product<S>(random, number);
  Buffer<double> truth(product.B), true_wgrad(product.d * product.p), true_squares(product.d * product.p);
  for (int64_t e = 0; e < true_wgrad.count(); ++e) true_wgrad[e] = true_squares[e] = 0;
  for (int64_t i = 0; i < product.B; ++i) {
    core::Operands sample = product.wide();
    sample.a = static_cast<const double*>(sample.a) + i * sample.a_batch_stride;
    sample.b = static_cast<const double*>(sample.b) + i * sample.b_batch_stride;
    sample.batch = 1;
    Buffer<double> gradient(true_wgrad.count());
    cpu::wgrad_sqnorm(sample, nullptr, gradient.data(), truth.data() + i, cpu::serial(), cpu::capability());
    for (int64_t e = 0; e < gradient.count(); ++e) {
      true_wgrad[e] += gradient[e];
      true_squares[e] += gradient[e] * gradient[e];
    }
  }
  Expected expected;
  expected.add_norms<S>(truth);
  expected.add_wgrad<S>(true_wgrad);
  expected.add_wgrad<A>(true_squares);
  check(product.name("wgrad_moments"), expected, [&](std::vector<double>& results) {
    const core::Operands o = product.operands();
    Buffer<A> norms(o.batch), squares(o.out_features * o.in_features);
    Buffer<S> wgrad(o.out_features * o.in_features);
    const cudaError_t error = cuda::launch_wgrad_moments(o, wgrad.data(), squares.data(), norms.data(),
                                                         Workspace(cuda::wgrad_moments_workspace(o)).data(), nullptr);
    append(results, norms);
    append(results, wgrad);
    append(results, squares);
    return error;
  });
}

// An infinity in the corner of one sample, next to the padding: that sample's norm is infinite, not NaN, and no other
// knows.
template <class Launch>
static void test_infinity(const Launch& launch) {
  Random random(1);
  Product<float> product(random, 3, 5, 70, 66);
  product.a.batch_stride = 5 * 70;
  product.a.position_stride = 70;
  product.b.batch_stride = 5 * 66;
  product.b.position_stride = 66;
  product.tf32 = false;
  product.a.values = Buffer<float>(random, 3 * 5 * 70);
  product.b.values = Buffer<float>(random, 3 * 5 * 66);
  for (int64_t i = 0; i < product.b.values.count(); ++i) {
    product.b.values[i] = std::fabs(product.b.values[i]) + 0.5f;  // inf * b is inf
  }
  product.a.values[2 * 5 * 70 - 1] = INFINITY;  // the last feature of the last position of sample 1
  Buffer<float> norms(3);
  EXPECT(launch(product.operands(), norms.data()) == cudaSuccess);
  EXPECT(std::isinf(norms[1]), "%g", norms[1]);
  EXPECT(std::isfinite(norms[0]) && std::isfinite(norms[2]));
}

static void test_infinity_outer_sqnorm() {
  test_infinity([](const core::Operands& o, float* norms) {
    return cuda::launch_outer_sqnorm(o, norms, Workspace(cuda::outer_sqnorm_workspace(o)).data(), nullptr);
  });
}

static void test_infinity_wgrad_sqnorm() {
  test_infinity([](const core::Operands& o, float* norms) {
    Buffer<float> wgrad(o.out_features * o.in_features);
    return cuda::launch_wgrad_sqnorm(o, nullptr, wgrad.data(), norms, Workspace(cuda::wgrad_sqnorm_workspace(o)).data(),
                                     nullptr);
  });
}

// --- convolutions ---

static convolutions::Case draw_convolution(Random& random) {
  convolutions::Case c{};
  c.batch = random.of<int64_t>({1, 2, 3, 5});
  c.runs = random.chance(5) ? 2 : 1;
  c.group_channels = random.of<int64_t>({1, 2, 3, 8, 15, 16, 17, 32});
  c.group_outputs = random.of<int64_t>({1, 3, 8, 16, 17, 33, 64, 65});
  c.groups = random.chance(3) ? 1 + random.below(4) : 1;
  c.channels_last = random.chance(2);
  const int first = random.chance(6) ? 0 : random.chance(4) ? 2 : 1;  // 3, 1 or 2 spatial dimensions
  for (int i = 0; i < 3; ++i) {
    c.size[i] = c.kernel[i] = c.stride[i] = c.dilation[i] = 1;
    if (i < first) continue;
    c.kernel[i] = 1 + random.below(3);
    c.stride[i] = 1 + random.below(2);
    c.padding[i] = random.below(3);
    c.dilation[i] = 1 + random.below(2);
    c.size[i] = c.dilation[i] * (c.kernel[i] - 1) + 1 + random.below(first == 2 ? 70 : 8);
  }
  return c;
}

// Small groups are multiplied without tensor cores (conv_groups.cuh), so their operands are never rounded.
static bool rounds(const core::Convolution& o, bool tf32) {
  return tf32 && !(o.groups > 1 && o.elements() <= 128 * o.groups);
}

template <class S>
struct Convolution {
  bool tf32;
  core::Convolution o, wide;
  Buffer<S> x, b;
  Buffer<double> wide_x, wide_b;

  Convolution(Random& random, const convolutions::Case& c)
      : tf32(draw_tf32<S>(random)),
        o(convolutions::convolution(c, kDType<S>)),
        wide(convolutions::convolution(c, core::DType::kFloat64)),
        x(random, convolutions::x_elements(o), draw_offset(random)),
        b(random, convolutions::b_elements(o), draw_offset(random)),
        wide_x(x.widened(rounds(o, tf32))),
        wide_b(b.widened(rounds(o, tf32))) {
    o.tf32 = tf32;
    o.x = x.data();
    o.b = b.data();
    wide.x = wide_x.data();
    wide.b = wide_b.data();
  }
  std::string name(const char* op) const {
    return text(op, kDType<S>,
                {o.batch, o.runs, o.channels, o.out_channels, o.groups, o.out[0], o.out[1], o.out[2], o.kernel[0],
                 o.kernel[1], o.kernel[2], o.x_strides[2]});
  }
};

template <class S>
static Convolution<S> draw_convolution(Random& random, int number) {
  const int kept = static_cast<int>(std::size(convolutions::kCases));
  const bool table = number < kept && convolutions::kCases[number].batch < 100;  // the emulation is slow
  return Convolution<S>(random, table ? convolutions::kCases[number] : draw_convolution(random));
}

template <class S>
static void test_conv_sqnorm(Random& random, int number) {
  using A = core::accumulation_t<S>;
  const Convolution<S> convolution = draw_convolution<S>(random, number);
  const core::Convolution& o = convolution.o;
  Buffer<double> truth(o.batch);
  cpu::conv_outer_sqnorm(convolution.wide, truth.data(), cpu::serial(), cpu::capability());
  Expected expected;
  expected.add_norms<S>(truth);
  check(convolution.name("conv_sqnorm"), expected, [&](std::vector<double>& results) {
    Buffer<A> norms(o.batch);
    const cudaError_t error =
        cuda::launch_conv_sqnorm(o, norms.data(), Workspace(cuda::conv_sqnorm_workspace(o)).data(), nullptr);
    append(results, norms);
    return error;
  });
}

template <class S>
static void test_conv_wgrad_sqnorm(Random& random, int number) {
  using A = core::accumulation_t<S>;
  const Convolution<S> convolution = draw_convolution<S>(random, number);
  const core::Convolution& o = convolution.o;
  Buffer<double> truth(o.batch), true_wgrad(o.elements());
  cpu::conv_wgrad_sqnorm(convolution.wide, true_wgrad.data(), truth.data(), cpu::serial(), cpu::capability());
  Expected expected;
  expected.add_norms<S>(truth);
  expected.add_wgrad<S>(true_wgrad);
  check(convolution.name("conv_wgrad_sqnorm"), expected, [&](std::vector<double>& results) {
    Buffer<A> norms(o.batch);
    Buffer<S> wgrad(o.elements());
    const cudaError_t error = cuda::launch_conv_wgrad_sqnorm(
        o, wgrad.data(), norms.data(), Workspace(cuda::conv_wgrad_sqnorm_workspace(o)).data(), nullptr);
    append(results, norms);
    append(results, wgrad);
    return error;
  });
}

// --- row_sqnorm, embedding_sqnorm, affine_sqnorm ---

template <class S>
static void test_row_sqnorm(Random& random, int number) {
  using A = core::accumulation_t<S>;
  const int64_t B = number == 0 ? 600 : random.size(70), N = number < 2 ? 9000 * number + 3 : random.size(3000);
  const Tensor<S> x(random, B, 1, N);
  const Buffer<double> wide = x.values.widened();
  const core::Rows o{x.values.data(), kDType<S>, B, N, x.batch_stride};
  const core::Rows wide_rows{wide.data(), core::DType::kFloat64, B, N, x.batch_stride};
  Buffer<double> truth(B);
  cpu::row_sqnorm(wide_rows, truth.data(), cpu::serial(), cpu::capability());
  Expected expected;
  expected.add(truth, [](double norm) { return (sizeof(A) == 8 ? 1e-14 : 1e-6) * norm; });
  check(text("row_sqnorm", kDType<S>, {B, N, x.batch_stride}), expected, [&](std::vector<double>& results) {
    Buffer<A> norms(B);
    const cudaError_t error =
        cuda::launch_row_sqnorm(o, norms.data(), Workspace(cuda::row_sqnorm_workspace(o)).data(), nullptr);
    append(results, norms);
    return error;
  });
}

template <class S, class Index>
static void test_embedding(Random& random, int number) {
  using A = core::accumulation_t<S>;
  struct Case {
    int64_t B, T, d, vocabulary;
  };
  const Case always[] = {{2, 0, 4, 5}, {2, 300, 4, 1}, {2, 700, 33, 6}, {1, 2048, 3, 9}, {2, 2049, 3, 900}};
  const Case c = number < 5 ? always[number]
                            : Case{random.size(9), random.size(300), random.size(260), random.of<int64_t>({1, 4, 300})};
  const Tensor<S> b(random, c.B, c.T, c.d);
  const Buffer<double> wide = b.values.widened();
  Buffer<Index> index(extent({c.B, c.T}, {2 * c.T + 1, 2}), draw_offset(random));
  for (int64_t i = 0; i < c.B; ++i) {
    for (int64_t t = 0; t < c.T; ++t) {  // negative ones belong to no row
      const int64_t token = random.below(c.vocabulary + 1) - (c.vocabulary > 1);
      index[i * (2 * c.T + 1) + 2 * t] = static_cast<Index>(token * (sizeof(Index) == 8 ? 0x123456789abcd : 12345));
    }
  }
  const auto picks = [&](const void* values, core::DType dtype) {
    return core::Picks{index.data(),   sizeof(Index) == 8, values, dtype, c.B, c.T, c.d, 2 * c.T + 1, 2,
                       b.batch_stride, b.position_stride};
  };
  Buffer<double> truth(c.B);
  cpu::embedding_sqnorm(picks(wide.data(), core::DType::kFloat64), truth.data(), cpu::serial(), cpu::capability());
  Expected expected;
  expected.add_norms<S>(truth);
  check(text("embedding_sqnorm", kDType<S>, {c.B, c.T, c.d, c.vocabulary}), expected,
        [&](std::vector<double>& results) {
          const core::Picks o = picks(b.values.data(), kDType<S>);
          Buffer<A> norms(c.B);
          const cudaError_t error = cuda::launch_embedding_sqnorm(
              o, norms.data(), Workspace(cuda::embedding_sqnorm_workspace(o)).data(), nullptr);
          append(results, norms);
          return error;
        });
}

template <class S>
static void test_embedding_sqnorm(Random& random, int number) {
  number % 2 == 0 ? test_embedding<S, int64_t>(random, number) : test_embedding<S, int32_t>(random, number);
}

// Channels last if `after` is 1, else channels first; with and without scale, statistics and totals.
template <class S>
static void test_affine_sqnorm(Random& random, int number) {
  using A = core::accumulation_t<S>;
  struct Case {
    int64_t B, before, d, after, groups;
  };
  const Case always[] = {{2, 1030, 3, 1, 1}, {70, 2, 12, 1, 3}, {3, 2, 40, 35, 4}, {1, 1, 2, 2100, 2}, {0, 3, 4, 1, 2}};
  Case c = number < 5 ? always[number] : Case{random.size(9), random.size(70), random.size(130), 1, 1};
  if (number >= 5 && random.chance(2)) {
    c.before = 1 + random.below(3);
    c.after = random.size(130);
  }
  if (number >= 5 && c.d > 0) {
    do c.groups = 1 + random.below(c.d);
    while (c.d % c.groups != 0);
  }
  const bool last = c.after == 1, scaled = !random.chance(3), totals = !random.chance(4);
  const int64_t rows = last ? c.before : c.before * c.d, length = last ? c.d : c.after;
  const Tensor<S> b(random, c.B, rows, length), x(random, scaled ? c.B : 0, rows, length);
  const bool has_mean = scaled && random.chance(2), has_rstd = scaled && random.chance(2);
  const int64_t statistics = c.before * c.groups;
  const Buffer<A> mean(random, has_mean ? c.B * statistics : 0), rstd(random, has_rstd ? c.B * statistics : 0);
  const Buffer<double> wide_b = b.values.widened(), wide_x = x.values.widened(), wide_mean = mean.widened(),
                       wide_rstd = rstd.widened();
  const auto affine = [&](const void* b_data, const void* x_data, const void* mean_data, const void* rstd_data,
                          core::DType dtype) {
    core::Affine o{};
    o.b = b_data;
    o.scaled = scaled;
    o.x = x_data;
    o.mean = has_mean ? mean_data : nullptr;
    o.rstd = has_rstd ? rstd_data : nullptr;
    o.dtype = dtype;
    o.batch = c.B;
    o.before = c.before;
    o.channels = c.d;
    o.after = c.after;
    o.groups = c.groups;
    o.b_batch_stride = b.batch_stride;
    o.b_before_stride = last ? b.position_stride : c.d * b.position_stride;
    o.b_channel_stride = last ? 1 : b.position_stride;
    o.x_batch_stride = x.batch_stride;
    o.x_before_stride = last ? x.position_stride : c.d * x.position_stride;
    o.x_channel_stride = last ? 1 : x.position_stride;
    o.mean_batch_stride = o.rstd_batch_stride = statistics;
    o.mean_before_stride = o.rstd_before_stride = c.groups;
    o.mean_group_stride = o.rstd_group_stride = 1;
    return o;
  };

  // Terms are at most 2 in magnitude.
  const double elements = static_cast<double>(c.before * c.after), channels = static_cast<double>(c.d);
  const double of_sample = 2 * elements * (sizeof(A) == 8 ? 1e-15 : 1e-6);
  const double of_total = of_sample * static_cast<double>(c.B);
  Buffer<double> true_scale(c.d), true_scale_sqnorm(c.B), true_shift(c.d), true_shift_sqnorm(c.B);
  cpu::affine_sqnorm(
      affine(wide_b.data(), wide_x.data(), wide_mean.data(), wide_rstd.data(), core::DType::kFloat64),
      core::AffineResults{true_scale.data(), true_scale_sqnorm.data(), true_shift.data(), true_shift_sqnorm.data()},
      cpu::serial(), cpu::capability());
  const auto total_tolerance = [&](double value) { return of_total + kRounding<A> * std::fabs(value); };
  const auto norm_tolerance = [&](double norm) {
    return 2 * std::sqrt(norm * channels) * of_sample + channels * of_sample * of_sample + 1e-7 * norm;
  };
  Expected expected;
  if (scaled) expected.add(true_scale_sqnorm, norm_tolerance);
  expected.add(true_shift_sqnorm, norm_tolerance);
  if (totals && scaled) expected.add(true_scale, total_tolerance);
  if (totals) expected.add(true_shift, total_tolerance);

  const std::string name = text("affine_sqnorm", kDType<S>, {c.B, c.before, c.d, c.after, c.groups, scaled, totals});
  check(name, expected, [&](std::vector<double>& results) {
    const core::Affine o = affine(b.values.data(), x.values.data(), mean.data(), rstd.data(), kDType<S>);
    Buffer<A> scale(c.d), scale_sqnorm(c.B), shift(c.d), shift_sqnorm(c.B);
    const core::AffineResults to{totals && scaled ? scale.data() : nullptr, scaled ? scale_sqnorm.data() : nullptr,
                                 totals ? shift.data() : nullptr, shift_sqnorm.data()};
    const cudaError_t error =
        cuda::launch_affine_sqnorm(o, to, Workspace(cuda::affine_sqnorm_workspace(o)).data(), nullptr);
    if (scaled) append(results, scale_sqnorm);
    append(results, shift_sqnorm);
    if (totals && scaled) append(results, scale);
    if (totals) append(results, shift);
    return error;
  });
}

// Layer norms if `after` is 1, group and instance norms else; rows and groups that are held, and such that are too
// long.
template <class S>
static void test_norm_affine(Random& random, int number) {
  using A = core::accumulation_t<S>;
  constexpr int64_t kVector = 16 / sizeof(S);
  struct Case {
    int64_t B, before, d, after, groups;
  };
  const Case always[] = {{2, 5, 96 * kVector, 1, 1},
                         {1, 3, 520 * kVector, 1, 1},
                         {1, 2, (sizeof(S) == 4 ? 2050 : 1026) * kVector, 1, 1},
                         {1, 2, 513 * kVector + 1, 1, 1},
                         {3, 150, 8, 1, 1},
                         {300, 1, 24, 1, 1},
                         {70, 3, 24, 1, 3},
                         {2, 1, 6, 2600 * kVector, 2},
                         {2, 2, 16, 64, 4},
                         {3, 1, 5, 1000, 5},
                         {0, 3, 4, 1, 2},
                         {2, 0, 4, 1, 1},
                         {2, 0, 4, 3, 2},
                         {2, 3, 0, 1, 1},
                         {2, 1, 4, 0, 2}};
  constexpr int kAlways = static_cast<int>(sizeof(always) / sizeof(Case));
  Case c = number < kAlways ? always[number] : Case{1 + random.below(4), random.size(70), 1 + random.below(140), 1, 1};
  if (number >= kAlways && random.chance(2)) {
    c.before = 1 + random.below(3);
    c.after = 2 + random.size(130);
  }
  if (number >= kAlways && (c.after != 1 || random.chance(4))) {
    do c.groups = 1 + random.below(c.d);
    while (c.d % c.groups != 0);
  }
  const bool last = c.after == 1, weighted = random.chance(2);
  const int64_t rows = last ? c.before : c.before * c.d, length = last ? c.d : c.after;
  const Tensor<S> b(random, c.B, rows, length), x(random, c.B, rows, length);
  const int64_t statistics = c.before * c.groups, image = c.d * c.after;
  const Buffer<A> mean(random, c.B * statistics), rstd(random, c.B * statistics);
  const Buffer<A> weight(random, weighted ? c.d : 0, draw_offset(random));
  const Buffer<double> wide_b = b.values.widened(), wide_x = x.values.widened(), wide_mean = mean.widened(),
                       wide_rstd = rstd.widened(), wide_weight = weight.widened();
  const bool positions_first = random.chance(3);  // of the gradient
  const int64_t offset = draw_offset(random);
  const auto normalisation = [&](const void* b_data, const void* x_data, const void* mean_data, const void* rstd_data,
                                 const void* weight_data, void* gradient, core::DType dtype) {
    core::Normalisation n{};
    core::Affine& o = n.affine;
    o.b = b_data;
    o.scaled = true;
    o.x = x_data;
    o.mean = mean_data;
    o.rstd = rstd_data;
    o.dtype = dtype;
    o.batch = c.B;
    o.before = c.before;
    o.channels = c.d;
    o.after = c.after;
    o.groups = c.groups;
    o.b_batch_stride = b.batch_stride;
    o.b_before_stride = last ? b.position_stride : c.d * b.position_stride;
    o.b_channel_stride = last ? 1 : b.position_stride;
    o.x_batch_stride = x.batch_stride;
    o.x_before_stride = last ? x.position_stride : c.d * x.position_stride;
    o.x_channel_stride = last ? 1 : x.position_stride;
    o.mean_batch_stride = o.rstd_batch_stride = statistics;
    o.mean_before_stride = o.rstd_before_stride = c.groups;
    o.mean_group_stride = o.rstd_group_stride = 1;
    n.weight = weighted ? weight_data : nullptr;
    n.gradient = gradient;
    n.batch_stride = positions_first ? image : c.before * image;
    n.before_stride = positions_first ? c.B * image : image;
    return n;
  };

  // Terms of the sums are at most 2 in magnitude; those of the gradient at most 4.
  const double elements = static_cast<double>(c.before * c.after), channels = static_cast<double>(c.d);
  const double of_sample = 2 * elements * (sizeof(A) == 8 ? 1e-15 : 1e-6);
  const double of_total = of_sample * static_cast<double>(c.B);
  Buffer<double> gradient(c.B * c.before * image), true_scale(c.d), true_scale_sqnorm(c.B), true_shift(c.d),
      true_shift_sqnorm(c.B);
  cpu::norm_affine(
      normalisation(wide_b.data(), wide_x.data(), wide_mean.data(), wide_rstd.data(), wide_weight.data(),
                    gradient.data(), core::DType::kFloat64),
      core::AffineResults{true_scale.data(), true_scale_sqnorm.data(), true_shift.data(), true_shift_sqnorm.data()},
      cpu::serial(), cpu::capability());
  const auto total_tolerance = [&](double value) { return of_total + kRounding<A> * std::fabs(value); };
  const auto norm_tolerance = [&](double norm) {
    return 2 * std::sqrt(norm * channels) * of_sample + channels * of_sample * of_sample + 1e-7 * norm;
  };
  Expected expected;
  expected.add(gradient,
               [](double value) { return 1.01 * kRounding<S> * std::fabs(value) + (sizeof(A) == 8 ? 1e-14 : 3e-6); });
  expected.add(true_scale_sqnorm, norm_tolerance);
  expected.add(true_shift_sqnorm, norm_tolerance);
  expected.add(true_scale, total_tolerance);
  expected.add(true_shift, total_tolerance);

  const std::string name =
      text("norm_affine", kDType<S>, {c.B, c.before, c.d, c.after, c.groups, weighted, positions_first, offset});
  check(name, expected, [&](std::vector<double>& results) {
    Buffer<S> got(c.B * c.before * image, offset);
    const core::Normalisation n =
        normalisation(b.values.data(), x.values.data(), mean.data(), rstd.data(), weight.data(), got.data(), kDType<S>);
    Buffer<A> scale(c.d), scale_sqnorm(c.B), shift(c.d), shift_sqnorm(c.B);
    const core::AffineResults to{scale.data(), scale_sqnorm.data(), shift.data(), shift_sqnorm.data()};
    const cudaError_t error =
        cuda::launch_norm_affine(n, to, Workspace(cuda::norm_affine_workspace(n)).data(), nullptr);
    append(results, got);
    append(results, scale_sqnorm);
    append(results, shift_sqnorm);
    append(results, scale);
    append(results, shift);
    return error;
  });
}

// An infinity in one sample's gradients: its norms and the totals are not finite, and no other sample knows.
static void test_infinity_norm_affine() {
  for (const int64_t after : {1, 40}) {
    Random random(1);
    const int64_t B = 3, T = 5, d = 40, image = d * after;
    Buffer<float> b(random, B * T * image), x(random, B * T * image), mean(random, B * T), rstd(random, B * T);
    b[2 * T * image - 1] = INFINITY;  // the last element of sample 1
    core::Normalisation n{};
    core::Affine& o = n.affine;
    o.b = b.data();
    o.scaled = true;
    o.x = x.data();
    o.mean = mean.data();
    o.rstd = rstd.data();
    o.dtype = core::DType::kFloat32;
    o.batch = B;
    o.before = T;
    o.channels = d;
    o.after = after;
    o.groups = 1;
    o.b_batch_stride = o.x_batch_stride = n.batch_stride = T * image;
    o.b_before_stride = o.x_before_stride = n.before_stride = image;
    o.b_channel_stride = o.x_channel_stride = after;
    o.mean_batch_stride = o.rstd_batch_stride = T;
    o.mean_before_stride = o.rstd_before_stride = 1;
    Buffer<float> gradient(B * T * image), scale(d), scale_sqnorm(B), shift(d), shift_sqnorm(B);
    n.gradient = gradient.data();
    const core::AffineResults to{scale.data(), scale_sqnorm.data(), shift.data(), shift_sqnorm.data()};
    EXPECT(cuda::launch_norm_affine(n, to, Workspace(cuda::norm_affine_workspace(n)).data(), nullptr) == cudaSuccess);
    for (int64_t e = 0; e < gradient.count(); ++e) {
      const int64_t row = e / image;
      EXPECT(std::isfinite(gradient[e]) == (row != 2 * T - 1), "element %ld", static_cast<long>(e));
    }
    for (int64_t i = 0; i < B; ++i) {
      EXPECT(std::isfinite(scale_sqnorm[i]) == (i != 1) && std::isinf(shift_sqnorm[i]) == (i == 1));
    }
    EXPECT(std::isfinite(scale[0]) && !std::isfinite(scale[d - 1]) && std::isinf(shift[d - 1]));
  }
}

// --- all of them ---

struct Op {
  const char* name;
  void (*tests[4])(Random& random, int number);  // one for each dtype
  int shapes;                                    // of each dtype
  void (*more)() = nullptr;
};

#define TESTS(OP) {test_##OP<float>, test_##OP<double>, test_##OP<core::BFloat16>, test_##OP<core::Float16>}
static const Op kOps[] = {
    {"affine_sqnorm", TESTS(affine_sqnorm), 20},
    {"conv_sqnorm", TESTS(conv_sqnorm), 22},
    {"conv_wgrad_sqnorm", TESTS(conv_wgrad_sqnorm), 22},
    {"embedding_sqnorm", TESTS(embedding_sqnorm), 16},
    {"gram_sqnorm", TESTS(gram_sqnorm), 20},
    {"norm_affine", TESTS(norm_affine), 28, test_infinity_norm_affine},
    {"outer_sqnorm", TESTS(outer_sqnorm), 20, test_infinity_outer_sqnorm},
    {"row_sqnorm", TESTS(row_sqnorm), 16},
    {"wgrad_moments", TESTS(wgrad_moments), 20},
    {"wgrad_sqnorm", TESTS(wgrad_sqnorm), 24, test_infinity_wgrad_sqnorm},
};

int main(int count, char** arguments) {
  for (const Op& op : kOps) {
    if (count > 1 && std::strcmp(arguments[1], op.name) != 0) continue;
    for (int dtype = 0; dtype < 4; ++dtype) {
      Random random(static_cast<unsigned>(dtype));
      for (int number = 0; number < op.shapes && failures < 20; ++number) op.tests[dtype](random, number);
    }
    if (op.more != nullptr) op.more();
  }
  EXPECT(problems > 0, "no such op");
  std::printf("%d problems, %d failures\n", problems, failures);
  return failures != 0;
}
