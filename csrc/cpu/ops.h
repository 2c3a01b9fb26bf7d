// The CPU kernels' front doors. Each picks the best instruction set that this machine has; Capability asks for another
// one (tests do).
#pragma once

#include "core/noise.h"
#include "core/nso.h"
#include "core/operands.h"
#include "core/plan.h"
#include "core/sections.h"
#include "cpu/parallel.h"

namespace ghostgrad::cpu {

enum class Capability : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best that this machine and this build have, or less if the environment variable GHOSTGRAD_CPU_CAPABILITY
// (portable, avx2, avx512, avx512bf16) asks for less.
Capability capability();
const char* name_of(Capability capability);
// The same as the plan sees it.
core::Machine machine();

// Results are in the accumulation type of the operands: float64 for float64, float32 for everything else.

// sqnorm[i] = ||b_i^T a_i||^2, tile by tile.
void outer_sqnorm(const core::Operands& operands,
                  void* sqnorm,  // (B,)
                  ParallelFor parallel, Capability capability);

// sqnorm[i] = sum_{s,t} <a_is, a_it> <b_is, b_it>.
void gram_sqnorm(const core::Operands& operands,
                 void* sqnorm,  // (B,)
                 ParallelFor parallel, Capability capability);

// wgrad = sum_i weights[i] b_i^T a_i in the operands' own dtype, and sqnorm as outer_sqnorm, in one pass.
void wgrad_sqnorm(const core::Operands& operands,
                  const void* weights,  // (B,) in the accumulation type, or null for ones
                  void* wgrad,          // (d, p)
                  void* sqnorm,         // (B,)
                  ParallelFor parallel, Capability capability);

// The same, unweighted, and squares = sum_i (b_i^T a_i)^2 element by element.
void wgrad_moments(const core::Operands& operands,
                   void* wgrad,    // (d, p)
                   void* squares,  // (d, p)
                   void* sqnorm,   // (B,)
                   ParallelFor parallel, Capability capability);

// sqnorm[i] = sum_j x[i, j]^2.
void row_sqnorm(const core::Rows& rows,
                void* sqnorm,  // (B,)
                ParallelFor parallel, Capability capability);

// sqnorm[i] = sum_{v >= 0} ||sum_{t: index[i, t] = v} b[i, t]||^2.
void embedding_sqnorm(const core::Picks& picks,
                      void* sqnorm,  // (B,)
                      ParallelFor parallel, Capability capability);

// With g_i = sum_{t,s} b[i, t, :, s] (x[i, t, :, s] - mean) rstd for the scale, and without that factor for the shift:
// sum_i g_i and ||g_i||^2 of both, in one pass.
void affine_sqnorm(const core::Affine& affine, const core::AffineResults& results, ParallelFor parallel,
                   Capability capability);

// The same of a layer that normalises before it scales, and the gradient of its input, in one pass.
void norm_affine(const core::Normalisation& normalisation, const core::AffineResults& results, ParallelFor parallel,
                 Capability capability);

// sqnorm[i] = ||G_i||^2 of a convolution's weight, tile by tile.
void conv_outer_sqnorm(const core::Convolution& convolution,
                       void* sqnorm,  // (B,)
                       ParallelFor parallel, Capability capability);

// The same from inner products of patches and of output gradients.
void conv_gram_sqnorm(const core::Convolution& convolution,
                      void* sqnorm,  // (B,)
                      ParallelFor parallel, Capability capability);

// wgrad = sum_i G_i in the operands' own dtype, and sqnorm, in one pass.
void conv_wgrad_sqnorm(const core::Convolution& convolution,
                       void* wgrad,   // (out_channels, channels / groups, *kernel)
                       void* sqnorm,  // (B,)
                       ParallelFor parallel, Capability capability);

// Of `count` tensors of one dtype. The sections say which parts of which parameters they are; their first_unit is
// filled in here.

// w <- w + sigma * xi.
void perturb(core::DType dtype, core::Section* sections,
             void* const* params,  // (count,)
             int64_t count, const core::Noise& noise, double sigma, ParallelFor parallel, Capability capability);

// dots[slot] = sum_i xi_i (plus_i - minus_i) / (2 sigma) over each tensor.
void probe_dot(core::DType dtype, core::Section* sections,
               const void* const* plus,   // (count,)
               const void* const* minus,  // (count,), or null for zeros
               int64_t count, const core::Noise& noise, double sigma,
               double* dots,  // (count,)
               ParallelFor parallel, Capability capability);

// The mean of the perturbed gradients mixed with the centre's, and the step of SGD; elements in any order that the
// tensors of an entry share.
void nso_step(core::DType dtype, core::Section* sections,
              const core::NsoTensor* tensors,  // (count,)
              int64_t count, const core::NsoStep& step, ParallelFor parallel, Capability capability);

// differences[i] = (plus[i] + minus[i] - 2 zero[i]) / sigma^2.
void second_difference(core::DType dtype,
                       const void* plus,   // (count,)
                       const void* zero,   // (count,)
                       const void* minus,  // (count,)
                       int64_t count, double sigma,
                       double* differences,  // (count,)
                       ParallelFor parallel, Capability capability);

}  // namespace ghostgrad::cpu
