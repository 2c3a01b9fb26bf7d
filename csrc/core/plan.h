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

// The norm's formula, and whether the weight gradient comes from the same pass (kFused) or from a matrix product of its
// own.
enum class Norm : int32_t { kRow = 0, kGram = 1, kOuter = 2, kFused = 3 };

struct Problem {
  int64_t batch, positions, in_features, out_features;  // B, T, p, d
  DType dtype;
  Machine machine;
  bool wgrad;  // the weight gradient is wanted, too
};

struct Plan {
  Norm norm;
  double flops;  // of everything asked for, the weight gradient included
  double time;   // expected, in nanoseconds of one thread: of the operations alone, not of moving their operands
};

// How fast the formulas run, in operations per nanosecond and thread; the choice sees ratios alone. `vendor` is
// PyTorch's own matrix product, `product` the panels of outer and fused, `gram` the blocks of inner products.
struct Speeds {
  double vendor, product, gram;
};

// Measured on one thread of an AMD EPYC 9005 (torch 2.13, MKL and oneDNN) at T, p, d of 64 to 1024. float16 has no fast
// matrix product on that CPU, bfloat16 has one only in AVX-512 machines. The CUDA row is a guess from the kernels'
// structure (plain fused multiply-adds beside tensor cores) until it is measured.
constexpr Speeds speeds(DType dtype, Machine machine) {
  const bool half = dtype == DType::kBFloat16 || dtype == DType::kFloat16;
  const double width = dtype == DType::kFloat64 ? 0.5 : 1.0;
  const double vendor = dtype == DType::kFloat16 ? 8 : 110 * width;
  switch (machine) {
    case Machine::kCuda:
      return half ? Speeds{600, 10, 10} : Speeds{50, 10, 10};
    case Machine::kCpuAvx512:
      return Speeds{dtype == DType::kBFloat16 ? 450 : vendor, 220 * width, 140 * width};
    case Machine::kCpuAvx2:
      return Speeds{vendor, 120 * width, 95 * width};
    case Machine::kCpuPortable:
      break;
  }
  return Speeds{vendor, 44 * width, (half ? 20 : 44) * width};
}

// What comes on top, in operations at the formula's own speed: adding up the lanes of a pair of positions, squaring an
// element, and carrying it into the weight gradient.
constexpr double kPairOverhead = 350, kSquareOverhead = 5, kCarryOverhead = 11;

constexpr Plan plan(const Problem& problem) {
  const double B = static_cast<double>(problem.batch), T = static_cast<double>(problem.positions);
  const double p = static_cast<double>(problem.in_features), d = static_cast<double>(problem.out_features);
  const double wgrad_flops = problem.wgrad ? B * 2 * T * p * d : 0;
  const Speeds speed = speeds(problem.dtype, problem.machine);
  const double wgrad_time = problem.wgrad ? 2 * T * p * d / speed.vendor : 0;
  if (problem.positions <= 1) return Plan{Norm::kRow, B * 2 * (p + d) + wgrad_flops, B * wgrad_time};

  const double pairs = T * (T + 4) / 2;  // of positions, in blocks of about four
  const double gram_time = pairs * (2 * (p + d) + kPairOverhead) / speed.gram;
  const double outer_time = (2 * T + kSquareOverhead) * p * d / speed.product;
  const double fused_time = (2 * T + kCarryOverhead) * p * d / speed.product;

  const bool gram_wins = gram_time <= outer_time;
  if (problem.wgrad && fused_time <= wgrad_time + (gram_wins ? gram_time : outer_time)) {
    return Plan{Norm::kFused, B * (2 * T * p * d + 4 * p * d), B * fused_time};
  }
  if (gram_wins) return Plan{Norm::kGram, B * T * T * (p + d) + wgrad_flops, B * (gram_time + wgrad_time)};
  return Plan{Norm::kOuter, B * (2 * T * p * d + 2 * p * d) + wgrad_flops, B * (outer_time + wgrad_time)};
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
  const double wgrad_time = problem.wgrad ? 2 * T * p * d / speed.vendor : 0;

  const bool gram_wins = problem.machine != Machine::kCuda && gram_time <= outer_time;
  if (problem.wgrad && (!gram_wins || fused_time <= wgrad_time + gram_time)) {
    return Plan{Norm::kFused, B * (2 * T * p * d + 4 * p * d), B * fused_time};
  }
  if (gram_wins) return Plan{Norm::kGram, B * T * T * (p + d) + wgrad_flops, B * (gram_time + wgrad_time)};
  return Plan{Norm::kOuter, B * (2 * T * p * d + 2 * p * d), B * outer_time};
}

}  // namespace ghostgrad::core
