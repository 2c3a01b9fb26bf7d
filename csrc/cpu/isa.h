// Declarations of the kernels, once per instruction set. dispatch.cpp calls them, the kernel files define them.
#pragma once

#include "core/operands.h"
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
  }

GHOSTGRAD_DECLARE_KERNELS(portable)
GHOSTGRAD_DECLARE_KERNELS(avx2)
GHOSTGRAD_DECLARE_KERNELS(avx512)
GHOSTGRAD_DECLARE_KERNELS(avx512bf16)
#undef GHOSTGRAD_DECLARE_KERNELS
