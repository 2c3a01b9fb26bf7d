// second_difference on the CPU: one pass over three vectors of losses.
#include "core/second_difference.h"

#include "core/dtype.h"
#include "core/storage.h"
#include "cpu/isa.h"
#include "cpu/simd.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

template <class S>
void run(const void* plus, const void* zero, const void* minus, int64_t count, double sigma, double* differences,
         ParallelFor parallel) {
  const auto at = [](const void* losses, int64_t i) {
    return static_cast<double>(core::to_accumulation(static_cast<const S*>(losses)[i]));
  };
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      differences[i] = core::second_difference(at(plus, i), at(zero, i), at(minus, i), sigma);
    }
  };
  parallel(count, 16.0 * static_cast<double>(count), body);
}

}  // namespace

void second_difference(core::DType dtype, const void* plus, const void* zero, const void* minus, int64_t count,
                       double sigma, double* differences, ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(dtype, run, plus, zero, minus, count, sigma, differences, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
