// The plan is made at compile time as well as at run time: that it is a pure function is checked by the compiler.
#include "core/plan.h"

#include <initializer_list>

#include "expect.h"

using namespace ghostgrad::core;

constexpr Norm choice(int64_t T, int64_t p, int64_t d, bool wgrad) {
  return plan(Problem{8, T, p, d, DType::kFloat32, Machine::kCpuAvx512, wgrad}).norm;
}

static_assert(choice(1, 64, 64, false) == Norm::kRow && choice(1, 64, 64, true) == Norm::kRow &&
              choice(0, 64, 64, true) == Norm::kRow);
static_assert(choice(2, 1024, 1024, false) == Norm::kGram);
static_assert(choice(4096, 64, 64, false) == Norm::kOuter);
static_assert(choice(256, 1024, 1024, true) == Norm::kFused);

constexpr Norm conv_choice(int64_t T, int64_t p, int64_t d, bool wgrad, Machine machine = Machine::kCpuAvx512) {
  return conv_plan(ConvProblem{8, T, p, d, 1, DType::kFloat32, machine, wgrad}).norm;
}

static_assert(conv_choice(1024, 144, 16, false) == Norm::kOuter && conv_choice(1024, 144, 16, true) == Norm::kFused);
static_assert(conv_choice(16, 4608, 512, false) == Norm::kGram && conv_choice(16, 4608, 512, true) == Norm::kGram);
static_assert(conv_choice(16, 4608, 512, false, Machine::kCuda) == Norm::kOuter);
static_assert(conv_choice(1, 64, 64, false) == Norm::kGram && conv_choice(1, 64, 64, true) == Norm::kGram);

int main() {
  // Longer T never turns an outer product into a Gram matrix.
  for (Machine machine : {Machine::kCpuPortable, Machine::kCpuAvx2, Machine::kCpuAvx512, Machine::kCuda}) {
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      for (int64_t p : {1, 16, 100, 4096}) {
        for (int64_t d : {1, 16, 100, 4096}) {
          bool outer = false;
          for (int64_t T = 2; T < 20000; T = T * 5 / 4 + 1) {
            const Plan chosen = plan(Problem{4, T, p, d, dtype, machine, false});
            EXPECT(!outer || chosen.norm == Norm::kOuter, "T = %ld, p = %ld, d = %ld", T, p, d);
            outer = chosen.norm == Norm::kOuter;
            EXPECT(chosen.flops > 0);
          }
        }
      }
    }
  }
  return failures;
}
