// The planned ops: sqnorm, wgrad_and_sqnorm and conv_wgrad_and_sqnorm choose a formula by core/plan.h and call the op
// that has it.
//
// The choice is made here, below the dispatcher, and not in Python, so that under torch.compile with dynamic shapes it
// is made when the sizes are known: no guard, no recompilation, and no second copy of the plan. One implementation
// serves every device, since all it does is call other ops.
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "core/plan.h"
#include "core/tiles.h"
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

std::tuple<Tensor, Tensor> wgrad_sqnorm(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{from(a), from(b), from(std::optional<Tensor>())};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("ghostgrad::wgrad_sqnorm", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};  // (d, p), (B,)
}

// A weight gradient by itself is that of one sample with all positions; of some, if the matrix is so small that threads
// would find too few tiles of it.
int64_t product_samples(int64_t B, int64_t T, int64_t p, int64_t d) {
  constexpr int64_t kTileEdge = 128, kUnits = 4;
  int64_t samples = core::sample_runs(B, T, core::ceil_div(p, kTileEdge) * core::ceil_div(d, kTileEdge), kUnits);
  while (B % samples != 0) --samples;
  return samples;
}

std::tuple<Tensor, Tensor> wgrad_and_sqnorm(const Tensor& a,    // (B, T, p)
                                            const Tensor& b) {  // (B, T, d)
  const core::Plan chosen = plan_for("wgrad_and_sqnorm", a, b, /*wgrad=*/true);
  if (chosen.wgrad == core::Wgrad::kFused) return wgrad_sqnorm(a, b);
  const int64_t rows = a.size(0) * a.size(1);
  if (chosen.wgrad == core::Wgrad::kProduct) {
    const int64_t samples = product_samples(a.size(0), a.size(1), a.size(2), b.size(2));
    const Tensor wgrad = std::get<0>(wgrad_sqnorm(::torch::stable::reshape(a, {samples, rows / samples, a.size(2)}),
                                                  ::torch::stable::reshape(b, {samples, rows / samples, b.size(2)})));
    return {wgrad, norm_by(chosen.norm, a, b)};
  }
  const Tensor rows_of_a = ::torch::stable::reshape(a, {rows, a.size(2)});  // (B T, p)
  const Tensor rows_of_b = ::torch::stable::reshape(b, {rows, b.size(2)});  // (B T, d)
  return {::torch::stable::matmul(::torch::stable::transpose(rows_of_b, 0, 1), rows_of_a), norm_by(chosen.norm, a, b)};
}

// Both take the same arguments. Returned by `op`: as many tensors as its schema says.
template <size_t kResults>
std::array<Tensor, kResults> call_conv(const char* op, const Tensor& x, const Tensor& b,
                                       const ConvArguments& arguments) {
  std::array<StableIValue, 7> stack{from(x),
                                    from(b),
                                    from(arguments.kernel),
                                    from(arguments.stride),
                                    from(arguments.padding),
                                    from(arguments.dilation),
                                    from(arguments.groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, kResults> results;
  for (size_t i = 0; i < kResults; ++i) results[i] = to<Tensor>(stack[i]);
  return results;
}

// The batch's weight gradient, by PyTorch.
Tensor conv_wgrad(const Tensor& x, const Tensor& b, const ConvArguments& arguments, const core::Convolution& o) {
  const int64_t dims = x.dim() - 3;
  auto runs_flattened = [&](const Tensor& t) {
    std::vector<int64_t> shape{t.size(0) * t.size(1)};
    for (int64_t dim = 2; dim < t.dim(); ++dim) shape.push_back(t.size(dim));
    return ::torch::stable::reshape(t, shape);
  };
  const Tensor weight = ::torch::stable::new_empty(x, weight_shape(o, arguments), x.scalar_type());
  const bool wanted[3] = {false, true, false};  // of the gradients of input, weight and bias
  const std::vector<int64_t> no_output_padding(static_cast<size_t>(dims), 0);
  std::array<StableIValue, 11> stack{from(runs_flattened(b)),
                                     from(runs_flattened(x)),
                                     from(weight),
                                     from(std::optional<std::vector<int64_t>>()),
                                     from(arguments.stride),
                                     from(arguments.padding),
                                     from(arguments.dilation),
                                     from(false),
                                     from(no_output_padding),
                                     from(arguments.groups),
                                     from(::torch::headeronly::HeaderOnlyArrayRef<bool>(wanted, 3))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  const std::array<Tensor, 3> grads{to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  return grads[1];
}

std::tuple<Tensor, Tensor> conv_wgrad_and_sqnorm(const Tensor& x,  // (B, R, c, *size)
                                                 const Tensor& b,  // (B, R, d, *out)
                                                 const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                                                 const std::vector<int64_t>& padding,
                                                 const std::vector<int64_t>& dilation, int64_t groups) {
  const ConvArguments arguments{kernel, stride, padding, dilation, groups};
  const core::Convolution o = checked_convolution("conv_wgrad_and_sqnorm", x, b, arguments).convolution;
  const core::Plan chosen =
      core::conv_plan(core::ConvProblem{o.batch, o.positions(), o.in_features(), o.group_outputs(), groups, o.dtype,
                                        x.is_cuda() ? core::Machine::kCuda : cpu::machine(), /*wgrad=*/true});
  bool whole = true;  // b is as large as the convolution's output, so PyTorch would take it
  for (int i = 0; i < 3; ++i) whole = whole && o.out[i] == output_size(o, i);
  if (!whole || chosen.norm == core::Norm::kFused || o.batch * o.positions() * o.elements() == 0) {
    const auto [wgrad, sqnorm] = call_conv<2>("ghostgrad::conv_wgrad_sqnorm", x, b, arguments);
    return {wgrad, sqnorm};  // (d, c / groups, *kernel), (B,)
  }
  return {conv_wgrad(x, b, arguments, o), call_conv<1>("ghostgrad::conv_sqnorm", x, b, arguments)[0]};
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CompositeExplicitAutograd, m) {
  m.impl("sqnorm", TORCH_BOX(&ghostgrad::binding::sqnorm));
  m.impl("wgrad_and_sqnorm", TORCH_BOX(&ghostgrad::binding::wgrad_and_sqnorm));
  m.impl("conv_wgrad_and_sqnorm", TORCH_BOX(&ghostgrad::binding::conv_wgrad_and_sqnorm));
}
