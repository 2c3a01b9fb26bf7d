// norm_affine on CUDA: PyTorch's own kernel for the gradient of the input, and affine_sqnorm.
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "torch/check.h"

namespace ghostgrad::binding {
namespace {

using ::torch::stable::detail::from;
using ::torch::stable::detail::to;

// The gradient of rows (rows, d, S) that are normalised each by itself, in groups of channels.
Tensor input_gradient(const Tensor& b,                        // (rows, d, S)
                      const Tensor& x,                        // (rows, d, S)
                      const Tensor& mean,                     // (rows, G)
                      const Tensor& rstd,                     // (rows, G)
                      const std::optional<Tensor>& weight) {  // (d,)
  const int64_t rows = x.size(0), channels = x.size(1), after = x.size(2), groups = mean.size(1);
  const bool wanted[3] = {true, false, false};  // of the gradients of input, weight and bias
  const ::torch::headeronly::HeaderOnlyArrayRef<bool> mask(wanted, 3);
  if (groups == 1 && after == 1) {
    std::array<StableIValue, 8> stack{from(::torch::stable::reshape(b, {rows, channels})),
                                      from(::torch::stable::reshape(x, {rows, channels})),
                                      from(std::vector<int64_t>{channels}),
                                      from(mean),
                                      from(rstd),
                                      from(weight),
                                      from(std::optional<Tensor>()),
                                      from(mask)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::native_layer_norm_backward", "", stack.data(), TORCH_ABI_VERSION));
    const std::array<Tensor, 3> grads{to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
    return grads[0];
  }
  std::array<StableIValue, 10> stack{from(b),    from(x),        from(mean),  from(rstd),   from(weight),
                                     from(rows), from(channels), from(after), from(groups), from(mask)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::native_group_norm_backward", "", stack.data(), TORCH_ABI_VERSION));
  const std::array<Tensor, 3> grads{to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  return grads[0];
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_affine_cuda(const Tensor& b,                 // (B, T, d, S)
                                                                    const Tensor& x,                 // (B, T, d, S)
                                                                    const Tensor& mean,              // (B, T, G)
                                                                    const Tensor& rstd,              // (B, T, G)
                                                                    std::optional<Tensor> weight) {  // (d,)
  CheckedNormalisation checked = checked_normalisation("norm_affine", b, x, mean, rstd, weight);
  const bool swapped = positions_first(x);
  // PyTorch's kernels want operands of one dtype and contiguous rows, in the order that the gradient will have.
  const bool layer = mean.size(2) == 1 && x.size(3) == 1;
  const auto rows_of = [&](const Tensor& t, const std::vector<int64_t>& tail, bool narrow) {
    const Tensor ordered = ::torch::stable::contiguous(swapped ? ::torch::stable::transpose(t, 0, 1) : t);
    std::vector<int64_t> shape{t.size(0) * t.size(1)};
    shape.insert(shape.end(), tail.begin(), tail.end());
    const Tensor rows = ::torch::stable::reshape(ordered, shape);
    return narrow ? ::torch::stable::to(rows, x.scalar_type()) : rows;
  };
  const std::vector<int64_t> row{x.size(2), x.size(3)}, groups{mean.size(2)};
  std::optional<Tensor> narrow_weight;
  if (checked.weight.has_value()) narrow_weight = ::torch::stable::to(*checked.weight, x.scalar_type());
  if (x.numel() > 0) {
    const Tensor gradient = input_gradient(rows_of(b, row, false), rows_of(x, row, false),
                                           rows_of(mean, groups, !layer), rows_of(rstd, groups, !layer), narrow_weight);
    const std::vector<int64_t> shape{x.size(swapped ? 1 : 0), x.size(swapped ? 0 : 1), x.size(2), x.size(3)};
    const Tensor ordered = ::torch::stable::reshape(gradient, shape);
    checked.gradient = swapped ? ::torch::stable::transpose(ordered, 0, 1) : ordered;
  }
  std::array<StableIValue, 5> stack{from(b), from(std::optional<Tensor>(x)), from(std::optional<Tensor>(mean)),
                                    from(std::optional<Tensor>(rstd)), from(true)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("ghostgrad::affine_sqnorm", "", stack.data(), TORCH_ABI_VERSION));
  return {checked.gradient, to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3])};
}

}  // namespace
}  // namespace ghostgrad::binding

STABLE_TORCH_LIBRARY_IMPL(ghostgrad, CUDA, m) {
  m.impl("norm_affine", TORCH_BOX(&ghostgrad::binding::norm_affine_cuda));
}
