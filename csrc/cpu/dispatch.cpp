// Chooses the instruction set at run time.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "cpu/isa.h"
#include "cpu/ops.h"

namespace ghostgrad::cpu {
namespace {

Capability machine_capability() {
#if defined(GHOSTGRAD_X86_KERNELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Capability::kAvx512Bf16;
  if (avx512) return Capability::kAvx512;
  if (avx2) return Capability::kAvx2;
#endif
  return Capability::kPortable;
}

Capability wanted_capability(Capability best) {
  const char* wish = std::getenv("GHOSTGRAD_CPU_CAPABILITY");
  if (wish == nullptr) return best;
  for (Capability c : {Capability::kPortable, Capability::kAvx2, Capability::kAvx512, Capability::kAvx512Bf16}) {
    if (std::strcmp(wish, name_of(c)) == 0) return c < best ? c : best;
  }
  return best;
}

}  // namespace

Capability capability() {
  static const Capability chosen = wanted_capability(machine_capability());
  return chosen;
}

const char* name_of(Capability capability) {
  switch (capability) {
    case Capability::kAvx512Bf16:
      return "avx512bf16";
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    case Capability::kPortable:
      break;
  }
  return "portable";
}

core::Machine machine() {
  switch (capability()) {
    case Capability::kAvx512Bf16:
      return core::Machine::kCpuAvx512Bf16;
    case Capability::kAvx512:
      return core::Machine::kCpuAvx512;
    case Capability::kAvx2:
      return core::Machine::kCpuAvx2;
    case Capability::kPortable:
      break;
  }
  return core::Machine::kCpuPortable;
}

#if defined(GHOSTGRAD_X86_KERNELS)
#define GHOSTGRAD_DISPATCH(CAPABILITY, CALL) \
  switch (CAPABILITY) {                      \
    case Capability::kAvx512Bf16:            \
      return avx512bf16::CALL;               \
    case Capability::kAvx512:                \
      return avx512::CALL;                   \
    case Capability::kAvx2:                  \
      return avx2::CALL;                     \
    case Capability::kPortable:              \
      return portable::CALL;                 \
  }
#else
#define GHOSTGRAD_DISPATCH(CAPABILITY, CALL) \
  static_cast<void>(CAPABILITY);             \
  return portable::CALL;
#endif

void outer_sqnorm(const core::Operands& operands, void* sqnorm, ParallelFor parallel, Capability capability) {
  GHOSTGRAD_DISPATCH(capability, outer_sqnorm(operands, sqnorm, parallel))
}

void gram_sqnorm(const core::Operands& operands, void* sqnorm, ParallelFor parallel, Capability capability) {
  GHOSTGRAD_DISPATCH(capability, gram_sqnorm(operands, sqnorm, parallel))
}

void wgrad_sqnorm(const core::Operands& operands, const void* weights, void* wgrad, void* sqnorm, ParallelFor parallel,
                  Capability capability) {
  GHOSTGRAD_DISPATCH(capability, wgrad_sqnorm(operands, weights, wgrad, sqnorm, parallel))
}

void wgrad_moments(const core::Operands& operands, void* wgrad, void* squares, void* sqnorm, ParallelFor parallel,
                   Capability capability) {
  GHOSTGRAD_DISPATCH(capability, wgrad_moments(operands, wgrad, squares, sqnorm, parallel))
}

void row_sqnorm(const core::Rows& rows, void* sqnorm, ParallelFor parallel, Capability capability) {
  GHOSTGRAD_DISPATCH(capability, row_sqnorm(rows, sqnorm, parallel))
}

void embedding_sqnorm(const core::Picks& picks, void* sqnorm, ParallelFor parallel, Capability capability) {
  GHOSTGRAD_DISPATCH(capability, embedding_sqnorm(picks, sqnorm, parallel))
}

void affine_sqnorm(const core::Affine& affine, const core::AffineResults& results, ParallelFor parallel,
                   Capability capability) {
  GHOSTGRAD_DISPATCH(capability, affine_sqnorm(affine, results, parallel))
}

void norm_affine(const core::Normalisation& normalisation, const core::AffineResults& results, ParallelFor parallel,
                 Capability capability) {
  GHOSTGRAD_DISPATCH(capability, norm_affine(normalisation, results, parallel))
}

void conv_outer_sqnorm(const core::Convolution& convolution, void* sqnorm, ParallelFor parallel,
                       Capability capability) {
  GHOSTGRAD_DISPATCH(capability, conv_outer_sqnorm(convolution, sqnorm, parallel))
}

void conv_gram_sqnorm(const core::Convolution& convolution, void* sqnorm, ParallelFor parallel, Capability capability) {
  GHOSTGRAD_DISPATCH(capability, conv_gram_sqnorm(convolution, sqnorm, parallel))
}

void conv_wgrad_sqnorm(const core::Convolution& convolution, void* wgrad, void* sqnorm, ParallelFor parallel,
                       Capability capability) {
  GHOSTGRAD_DISPATCH(capability, conv_wgrad_sqnorm(convolution, wgrad, sqnorm, parallel))
}

void perturb(core::DType dtype, core::Section* sections, void* const* params, int64_t count, const core::Noise& noise,
             double sigma, ParallelFor parallel, Capability capability) {
  GHOSTGRAD_DISPATCH(capability, perturb(dtype, sections, params, count, noise, sigma, parallel))
}

void probe_dot(core::DType dtype, core::Section* sections, const void* const* plus, const void* const* minus,
               int64_t count, const core::Noise& noise, double sigma, double* dots, ParallelFor parallel,
               Capability capability) {
  GHOSTGRAD_DISPATCH(capability, probe_dot(dtype, sections, plus, minus, count, noise, sigma, dots, parallel))
}

void second_difference(core::DType dtype, const void* plus, const void* zero, const void* minus, int64_t count,
                       double sigma, double* differences, ParallelFor parallel, Capability capability) {
  GHOSTGRAD_DISPATCH(capability, second_difference(dtype, plus, zero, minus, count, sigma, differences, parallel))
}

void nso_step(core::DType dtype, core::Section* sections, const core::NsoTensor* tensors, int64_t count,
              const core::NsoStep& step, ParallelFor parallel, Capability capability) {
  GHOSTGRAD_DISPATCH(capability, nso_step(dtype, sections, tensors, count, step, parallel))
}

}  // namespace ghostgrad::cpu
