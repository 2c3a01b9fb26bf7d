// The planned ops: sqnorm and wgrad_and_sqnorm choose a formula by core/plan.h and call the op that has it.
//
// The choice is made here, below the dispatcher, and not in Python, so that under torch.compile with dynamic shapes it
// is made when the sizes are known: no guard, no recompilation, and no second copy of the plan. One implementation
// serves every device, since all it does is call other ops.
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "core/plan.h"
#include "cpu/ops.h"
#include "torch/check.h"

namespace ghostgrad::binding {
namespace {

using ::torch::stable::detail::from;
using ::torch::stable::detail::to;

core::Plan plan_for(const char* op, const Tensor& a, const Tensor& b, bool wgrad) {
  check_shapes(op, a, b);
  return core::plan(core::Problem{a.size(0), a.size(1), a.size(2), b.size(2), dtype_of(op, "a", a),
                                  a.is_cuda() ? core::Machine::kCuda : cpu::machine(), wgrad});
}

Tensor call(const char* op, const Tensor& x, const Tensor& y) {
  std::array<StableIValue, 2> stack{from(x), from(y)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor row_sqnorm(const Tensor& x) {
  std::array<StableIValue, 1> stack{from(x)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("ghostgrad::row_sqnorm", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor product(const Tensor& x, const Tensor& y) {
  std::array<StableIValue, 2> stack{from(x), from(y)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor norm_by(core::Norm norm, const Tensor& a, const Tensor& b) {
  switch (norm) {
    case core::Norm::kRow:
      return product(row_sqnorm(a), row_sqnorm(b));  // T = 1: ||b_i^T a_i|| = ||a_i|| ||b_i||
    case core::Norm::kGram:
      return call("ghostgrad::gram_sqnorm", a, b);
    case core::Norm::kOuter:
    case core::Norm::kFused:
      break;
  }
  return call("ghostgrad::outer_sqnorm", a, b);
}

Tensor sqnorm(const Tensor& a,                                           // (B, T, p)
              const Tensor& b) {                                         // (B, T, d)
  return norm_by(plan_for("sqnorm", a, b, /*wgrad=*/false).norm, a, b);  // (B,)
}

std::tuple<Tensor, Tensor> wgrad_and_sqnorm(const Tensor& a,    // (B, T, p)
                                            const Tensor& b) {  // (B, T, d)
  const core::Plan chosen = plan_for("wgrad_and_sqnorm", a, b, /*wgrad=*/true);
  if (chosen.norm == core::Norm::kFused) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(std::optional<Tensor>())};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("ghostgrad::wgrad_sqnorm", "", stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};  // (d, p), (B,)
  }
  const Tensor rows_of_a = ::torch::stable::reshape(a, {a.size(0) * a.size(1), a.size(2)});  // (B T, p)
  const Tensor rows_of_b = ::torch::stable::reshape(b, {b.size(0) * b.size(1), b.size(2)});  // (B T, d)
  return {::torch::stable::matmul(::torch::stable::transpose(rows_of_b, 0, 1), rows_of_a), norm_by(chosen.norm, a, b)};
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CompositeExplicitAutograd, m) {
  m.impl("sqnorm", TORCH_BOX(&ghostgrad::binding::sqnorm));
  m.impl("wgrad_and_sqnorm", TORCH_BOX(&ghostgrad::binding::wgrad_and_sqnorm));
}
