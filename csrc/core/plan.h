// Which formula computes a layer's squared norms: a pure function of shapes, dtype, machine and whether the weight
// gradient is wanted as well.
//
// Floating-point operations per sample:
//
//   gram      T^2 (p + d), symmetry already halving them
//   outer     2 T p d, and 2 p d to square and add
//   fused     2 T p d, and 4 p d to square, add, and add again; the weight gradient included
//   matmul, product   2 T p d for a weight gradient of its own
//
// T = 1 is ||a_i||^2 ||b_i||^2: reading both once. Operations become time by speeds that were measured, below; nothing
// here is derived. docs/performance.md says how well it does.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace ghostgrad::core {

// Where the op runs, as far as speed is concerned: a GPU, or a CPU by the instruction set that our kernels use on it.
enum class Machine : int32_t { kCpuPortable = 0, kCpuAvx2 = 1, kCpuAvx512 = 2, kCpuAvx512Bf16 = 3, kCuda = 4 };

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
  double time;   // expected, in nanoseconds of one thread, where operations and not memory set the pace
};

// How fast things run, in operations per nanosecond and thread: PyTorch's own matrix product, our panels for norms
// alone and with the weight gradient (fused, or of the batch as one sample), and blocks of inner products; and how many
// rows and columns the panels of a product have too many: about the width of one.
struct Speeds {
  double matmul, outer, wgrad, gram, padding;
};

// Fitted to benchmarks/grid.py on one thread of an AMD EPYC 9005 (torch 2.13, MKL and oneDNN), where MKL uses no
// AVX-512: on other CPUs `matmul` may come up to `wgrad` for float32 and float64. The choice of the norm hardly feels
// that, since a weight gradient of its own is then as fast by either product. A CPU with matrix units (AMX) multiplies
// bfloat16 faster than is said here. float16 has no fast matrix product on that CPU. The CUDA rows are guesses from the
// kernels' structure, not measured: tensor cores for half types, fused multiply-adds for the rest.
constexpr Speeds speeds(DType dtype, Machine machine) {
  const bool half = dtype == DType::kBFloat16 || dtype == DType::kFloat16;
  const double width = dtype == DType::kFloat64 ? 0.5 : 1.0;
  const double matmul = dtype == DType::kFloat16 ? 8 : 95 * width;
  switch (machine) {
    case Machine::kCuda:
      return half ? Speeds{700e3, 550e3, 500e3, 400e3, 64}
                  : Speeds{45e3 * width, 35e3 * width, 30e3 * width, 30e3 * width, 32};
    case Machine::kCpuAvx512Bf16:
      if (dtype == DType::kBFloat16) return Speeds{410, 375, 350, 300, 32};
      [[fallthrough]];
    case Machine::kCpuAvx512:
      return Speeds{matmul, 190 * width, 170 * width, 140 * width, 32};
    case Machine::kCpuAvx2:
      return Speeds{matmul, 105 * width, 96 * width, 95 * width, 16};
    case Machine::kCpuPortable:
      break;
  }
  return Speeds{matmul, 44 * width, 42 * width, (half ? 20 : 44) * width, 8};
}

// What comes on top, in operations at the same speed: for a pair of positions, adding up its lanes; for an element read
// once; for an element of a product, squaring it, adding it to a running weight gradient, writing it out.
constexpr double kPairOverhead = 330, kReadOverhead = 10, kSquareOverhead = 5, kCarryOverhead = 6, kStoreOverhead = 40;
constexpr double kMatmulPadding = 16;  // the same for PyTorch's

// Nanoseconds for one sample.
constexpr double gram_time(const Speeds& speed, double T, double p, double d) {
  const double pairs = T * (T + 4) / 2;  // of positions, in blocks of about four
  return (pairs * (2 * (p + d) + kPairOverhead) + kReadOverhead * T * (p + d)) / speed.gram;
}
constexpr double outer_time(const Speeds& speed, double T, double p, double d) {
  return (2 * T + kSquareOverhead) * (p + speed.padding) * (d + speed.padding) / speed.outer;
}
constexpr double fused_time(const Speeds& speed, double T, double p, double d) {
  return (2 * T + kCarryOverhead) * (p + speed.padding) * (d + speed.padding) / speed.wgrad;
}
// Of all samples together: the weight gradient by itself.
constexpr double matmul_time(const Speeds& speed, double rows, double p, double d) {
  return 2 * rows * (p + kMatmulPadding) * (d + kMatmulPadding) / speed.matmul;
}
constexpr double product_time(const Speeds& speed, double rows, double p, double d) {
  return (2 * rows + kStoreOverhead) * (p + speed.padding) * (d + speed.padding) / speed.wgrad;
}

constexpr Plan plan(const Problem& problem) {
  const double B = static_cast<double>(problem.batch), T = static_cast<double>(problem.positions);
  const double p = static_cast<double>(problem.in_features), d = static_cast<double>(problem.out_features);
  const Speeds speed = speeds(problem.dtype, problem.machine);
  const double gram = gram_time(speed, T, p, d), outer = outer_time(speed, T, p, d);
  const Norm alone = problem.positions <= 1 ? Norm::kRow : gram <= outer ? Norm::kGram : Norm::kOuter;
  const double alone_flops = alone == Norm::kRow    ? B * 2 * (p + d)
                             : alone == Norm::kGram ? B * T * T * (p + d)
                                                    : B * (2 * T * p * d + 2 * p * d);
  const double alone_time = alone == Norm::kRow ? 0 : B * (gram <= outer ? gram : outer);
  if (!problem.wgrad) return Plan{alone, Wgrad::kNone, alone_flops, alone_time};

  // The formula does not depend on the batch, if there is one: it is chosen as for a large batch, for which the weight
  // gradient is written but once.
  const double matmul = matmul_time(speed, T, p, d),
               product = 2 * T * (p + speed.padding) * (d + speed.padding) / speed.wgrad;
  const double separately = (gram <= outer ? gram : outer) + (matmul <= product ? matmul : product);
  if (alone != Norm::kRow && fused_time(speed, T, p, d) <= separately) {
    return Plan{Norm::kFused, Wgrad::kFused, B * (2 * T * p * d + 4 * p * d), B * fused_time(speed, T, p, d)};
  }
  const bool by_product = product_time(speed, B * T, p, d) < matmul_time(speed, B * T, p, d);
  if (by_product && problem.batch == 1 && alone != Norm::kRow) {  // that product gives the only norm, too
    return Plan{Norm::kFused, Wgrad::kFused, 2 * T * p * d + 4 * p * d, fused_time(speed, T, p, d)};
  }
  const double wgrad_time = by_product ? product_time(speed, B * T, p, d) : matmul_time(speed, B * T, p, d);
  return Plan{alone, by_product ? Wgrad::kProduct : Wgrad::kMatmul, alone_flops + B * 2 * T * p * d,
              alone_time + wgrad_time};
}

// The same for a convolution's weight, where p are the input channels of a group times kernel offsets and d the output
// channels of a group. Patches are formed for Gram matrices alone.
struct ConvProblem {
  int64_t batch, positions, in_features, out_features, groups;
  DType dtype;
  Machine machine;
  bool wgrad;
};

// Measured as the above, on layers of residual networks; `matmul` is oneDNN's weight gradient.
constexpr Speeds conv_speeds(DType dtype, Machine machine) {
  const Speeds speed = speeds(dtype, machine);
  if (machine != Machine::kCpuAvx512 && machine != Machine::kCpuAvx512Bf16) return speed;
  const double width = dtype == DType::kFloat64 ? 0.5 : 1.0;
  return Speeds{dtype == DType::kFloat32 ? 205 : speed.matmul, 220 * width, 220 * width, 140 * width, 0};
}

// Operations for each element of a patch that is formed, and for each element of the weight gradient that is carried.
constexpr double kPatchOverhead = 45, kConvCarryOverhead = 11;

constexpr Plan conv_plan(const ConvProblem& problem) {
  const double B = static_cast<double>(problem.batch * problem.groups), T = static_cast<double>(problem.positions);
  const double p = static_cast<double>(problem.in_features), d = static_cast<double>(problem.out_features);
  const Speeds speed = conv_speeds(problem.dtype, problem.machine);
  const double gram = gram_time(speed, T, p, d) + kPatchOverhead * T * p / speed.gram;
  const double outer = (2 * T + kSquareOverhead) * p * d / speed.outer;
  const double fused = (2 * T + kConvCarryOverhead) * p * d / speed.wgrad;
  const double matmul = 2 * T * p * d / speed.matmul;

  const bool gram_wins = problem.machine != Machine::kCuda && gram <= outer;
  if (problem.wgrad && (!gram_wins || fused <= matmul + gram)) {
    return Plan{Norm::kFused, Wgrad::kFused, B * (2 * T * p * d + 4 * p * d), B * fused};
  }
  if (!gram_wins) return Plan{Norm::kOuter, Wgrad::kNone, B * (2 * T * p * d + 2 * p * d), B * outer};
  const double gram_flops = B * T * T * (p + d);
  if (!problem.wgrad) return Plan{Norm::kGram, Wgrad::kNone, gram_flops, B * gram};
  return Plan{Norm::kGram, Wgrad::kMatmul, gram_flops + B * 2 * T * p * d, B * (gram + matmul)};
}

}  // namespace ghostgrad::core
