// Which formula computes a layer's squared norms: a pure function of shapes, dtype, machine and whether the weight
// gradient is wanted as well.
//
// Floating-point operations per sample:
//
//   gram      T^2 (p + d), symmetry already halving them
//   outer     2 T p d, and 2 p d to square and add
//   fused     2 T p d, and 4 p d to square, add, and add again; the weight gradient included
//   vendor    2 T p d for a weight gradient from a matrix product of its own
//
// T = 1 is ||a_i||^2 ||b_i||^2: reading both once. Operations become time by speeds that were measured, below; nothing
// here is derived.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace ghostgrad::core {

// Where the op runs, as far as speed is concerned: a GPU, or a CPU by the instruction set that our kernels use on it.
enum class Machine : int32_t { kCpuPortable = 0, kCpuAvx2 = 1, kCpuAvx512 = 2, kCuda = 3 };

// The norm's formula; kFused gives the weight gradient in the same pass.
enum class Norm : int32_t { kRow = 0, kGram = 1, kOuter = 2, kFused = 3 };

// Where the weight gradient comes from: it is not wanted, a matrix product by PyTorch, one by our own kernel (the batch
// as one sample of B T positions), or the norm's own pass.
enum class Wgrad : int32_t { kNone = 0, kMatmul = 1, kProduct = 2, kFused = 3 };

struct Problem {
  int64_t batch, positions, in_features, out_features;  // B, T, p, d
  DType dtype;
  Machine machine;
  bool wgrad;  // the weight gradient is wanted, too
};

struct Plan {
  Norm norm;
  Wgrad wgrad;
  double flops;  // of everything asked for, the weight gradient included
};

// How fast the formulas run, in operations per nanosecond and thread; only ratios matter. `vendor` is PyTorch's own
// matrix product, `product` the panels of outer and fused, `gram` the blocks of inner products.
struct Speeds {
  double vendor, product, gram;
};

// Measured on one thread of an AMD EPYC 9005 (torch 2.13, MKL and oneDNN) by benchmarks/grid.py. float16 has no fast
// matrix product on that CPU, bfloat16 has one only in AVX-512 machines. MKL uses no AVX-512 on AMD's CPUs; elsewhere
// `vendor` may come up to `product` for float32 and float64, which the choice hardly feels, since then kProduct and
// kMatmul cost the same. The CUDA row is a guess from the kernels' structure (plain fused multiply-adds beside tensor
// cores) until it is measured.
constexpr Speeds speeds(DType dtype, Machine machine) {
  const bool half = dtype == DType::kBFloat16 || dtype == DType::kFloat16;
  const double width = dtype == DType::kFloat64 ? 0.5 : 1.0;
  const double vendor = dtype == DType::kFloat16 ? 8 : 100 * width;
  switch (machine) {
    case Machine::kCuda:
      return half ? Speeds{600, 10, 10} : Speeds{50, 10, 10};
    case Machine::kCpuAvx512:
      return Speeds{dtype == DType::kBFloat16 ? 450 : vendor, 220 * width, 140 * width};
    case Machine::kCpuAvx2:
      return Speeds{vendor, 108 * width, 95 * width};
    case Machine::kCpuPortable:
      break;
  }
  return Speeds{vendor, 44 * width, (half ? 20 : 44) * width};
}

// What comes on top, in operations at the formula's own speed: adding up the lanes of a pair of positions, squaring an
// element, carrying it into the weight gradient, and reading an element of a and b; and how many rows and columns of a
// product are padding, on average.
constexpr double kPairOverhead = 350, kSquareOverhead = 5, kCarryOverhead = 11, kReadOverhead = 20, kPadding = 16;

// Nanoseconds for one sample; of `rows` the product of as many positions, with `overhead` operations for each of its
// elements.
constexpr double product_time(const Speeds& speed, double rows, double overhead, double p, double d) {
  return (2 * rows + overhead) * (p + kPadding) * (d + kPadding) / speed.product;
}
constexpr double gram_time(const Speeds& speed, double T, double p, double d) {
  const double pairs = T * (T + 4) / 2;  // of positions, in blocks of about four
  return (pairs * (2 * (p + d) + kPairOverhead) + kReadOverhead * T * (p + d)) / speed.gram;
}

constexpr Plan plan(const Problem& problem) {
  const double B = static_cast<double>(problem.batch), T = static_cast<double>(problem.positions);
  const double p = static_cast<double>(problem.in_features), d = static_cast<double>(problem.out_features);
  const Speeds speed = speeds(problem.dtype, problem.machine);
  const double gram = gram_time(speed, T, p, d), outer = product_time(speed, T, kSquareOverhead, p, d);
  const Norm alone = problem.positions <= 1 ? Norm::kRow : gram <= outer ? Norm::kGram : Norm::kOuter;
  const double alone_flops = alone == Norm::kRow    ? B * 2 * (p + d)
                             : alone == Norm::kGram ? B * T * T * (p + d)
                                                    : B * (2 * T * p * d + 2 * p * d);
  if (!problem.wgrad) return Plan{alone, Wgrad::kNone, alone_flops};

  const double matmul = 2 * T * p * d / speed.vendor, product = product_time(speed, T, 0, p, d);
  const double separately = (alone == Norm::kGram ? gram : outer) + (matmul <= product ? matmul : product);
  if (alone != Norm::kRow && product_time(speed, T, kCarryOverhead, p, d) <= separately) {
    return Plan{Norm::kFused, Wgrad::kFused, B * (2 * T * p * d + 4 * p * d)};
  }
  const bool by_product = product_time(speed, B * T, kCarryOverhead, p, d) < B * matmul;
  return Plan{alone, by_product ? Wgrad::kProduct : Wgrad::kMatmul, alone_flops + B * 2 * T * p * d};
}

// The same for a convolution's weight, where p are the input channels of a group times kernel offsets and d the output
// channels of a group. Patches are formed for Gram matrices alone.
struct ConvProblem {
  int64_t batch, positions, in_features, out_features, groups;
  DType dtype;
  Machine machine;
  bool wgrad;
};

// Measured as the above, on layers of residual networks; `vendor` is oneDNN's weight gradient.
constexpr Speeds conv_speeds(DType dtype, Machine machine) {
  Speeds speed = speeds(dtype, machine);
  if (dtype == DType::kFloat32 && machine == Machine::kCpuAvx512) speed.vendor = 205;
  return speed;
}

// Operations for each element of a patch that is formed.
constexpr double kPatchOverhead = 45;

constexpr Plan conv_plan(const ConvProblem& problem) {
  const double B = static_cast<double>(problem.batch * problem.groups), T = static_cast<double>(problem.positions);
  const double p = static_cast<double>(problem.in_features), d = static_cast<double>(problem.out_features);
  const double wgrad_flops = problem.wgrad ? B * 2 * T * p * d : 0;
  const Speeds speed = conv_speeds(problem.dtype, problem.machine);
  const double pairs = T * (T + 4) / 2;
  const double gram_time = (pairs * (2 * (p + d) + kPairOverhead) + kPatchOverhead * T * p) / speed.gram;
  const double outer_time = (2 * T + kSquareOverhead) * p * d / speed.product;
  const double fused_time = (2 * T + kCarryOverhead) * p * d / speed.product;
  const double wgrad_time = 2 * T * p * d / speed.vendor;

  const bool gram_wins = problem.machine != Machine::kCuda && gram_time <= outer_time;
  if (problem.wgrad && (!gram_wins || fused_time <= wgrad_time + gram_time)) {
    return Plan{Norm::kFused, Wgrad::kFused, B * (2 * T * p * d + 4 * p * d)};
  }
  if (gram_wins)
    return Plan{Norm::kGram, problem.wgrad ? Wgrad::kMatmul : Wgrad::kNone, B * T * T * (p + d) + wgrad_flops};
  return Plan{Norm::kOuter, Wgrad::kNone, B * (2 * T * p * d + 2 * p * d)};
}

}  // namespace ghostgrad::core
