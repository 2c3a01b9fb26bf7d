// Declarations of the kernels, once per instruction set. dispatch.cpp calls them, the kernel files define them.
#pragma once

#include "core/noise.h"
#include "core/nso.h"
#include "core/operands.h"
#include "core/sections.h"
#include "cpu/parallel.h"

#define GHOSTGRAD_DECLARE_KERNELS(ISA)                                                                                \
  namespace ghostgrad::cpu::ISA {                                                                                     \
  void outer_sqnorm(const core::Operands& operands, void* sqnorm, ParallelFor parallel);                              \
  void gram_sqnorm(const core::Operands& operands, void* sqnorm, ParallelFor parallel);                               \
  void wgrad_sqnorm(const core::Operands& operands, const void* weights, void* wgrad, void* sqnorm,                   \
                    ParallelFor parallel);                                                                            \
  void wgrad_moments(const core::Operands& operands, void* wgrad, void* squares, void* sqnorm, ParallelFor parallel); \
  void row_sqnorm(const core::Rows& rows, void* sqnorm, ParallelFor parallel);                                        \
  void conv_outer_sqnorm(const core::Convolution& convolution, void* sqnorm, ParallelFor parallel);                   \
  void conv_gram_sqnorm(const core::Convolution& convolution, void* sqnorm, ParallelFor parallel);                    \
  void conv_wgrad_sqnorm(const core::Convolution& convolution, void* wgrad, void* sqnorm, ParallelFor parallel);      \
  void affine_sqnorm(const core::Affine& affine, const core::AffineResults& results, ParallelFor parallel);           \
  void norm_affine(const core::Normalisation& normalisation, const core::AffineResults& results,                      \
                   ParallelFor parallel);                                                                             \
  void embedding_sqnorm(const core::Picks& picks, void* sqnorm, ParallelFor parallel);                                \
  void perturb(core::DType dtype, core::Section* sections, void* const* params, int64_t count,                        \
               const core::Noise& noise, double sigma, ParallelFor parallel);                                         \
  void probe_dot(core::DType dtype, core::Section* sections, const void* const* plus, const void* const* minus,       \
                 int64_t count, const core::Noise& noise, double sigma, double* dots, ParallelFor parallel);          \
  void second_difference(core::DType dtype, const void* plus, const void* zero, const void* minus, int64_t count,     \
                         double sigma, double* differences, ParallelFor parallel);                                    \
  void nso_step(core::DType dtype, core::Section* sections, const core::NsoTensor* tensors, int64_t count,            \
                const core::NsoStep& step, ParallelFor parallel);                                                     \
  }

GHOSTGRAD_DECLARE_KERNELS(portable)
GHOSTGRAD_DECLARE_KERNELS(avx2)
GHOSTGRAD_DECLARE_KERNELS(avx512)
GHOSTGRAD_DECLARE_KERNELS(avx512bf16)
#undef GHOSTGRAD_DECLARE_KERNELS
