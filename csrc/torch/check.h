// What every binding asks of its arguments, and how tensors become the plain structs that kernels read.
//
// The Python wrappers check first, for the message; these checks make sure, for callers of torch.ops.ghostgrad. An
// error names the op, the argument, the rule and the value.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/limits.h"
#include "core/operands.h"

namespace ghostgrad::binding {

using ::torch::headeronly::ScalarType;
using ::torch::stable::Tensor;

template <class... Words>
inline void check(bool holds, const Words&... words) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << words);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream out;
  out << "(";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) out << (dim > 0 ? ", " : "") << tensor.size(dim);
  out << (tensor.dim() == 1 ? ",)" : ")");
  return out.str();
}

inline core::DType dtype_of(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return core::DType::kFloat32;
    case ScalarType::Double:
      return core::DType::kFloat64;
    case ScalarType::BFloat16:
      return core::DType::kBFloat16;
    case ScalarType::Half:
      return core::DType::kFloat16;
    default:
      break;
  }
  check(false, op, ": ", argument, " must be float32, float64, bfloat16 or float16, got scalar type ",
        static_cast<int>(tensor.scalar_type()));
  return core::DType::kFloat32;
}

inline ScalarType accumulation_type(core::DType dtype) {
  return dtype == core::DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// The last dimension gets unit stride, by a copy if need be; the others keep what they have.
inline Tensor with_unit_last_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : ::torch::stable::contiguous(tensor);
}

inline bool same_device(const Tensor& x, const Tensor& y) {
  return x.is_cuda() == y.is_cuda() && x.is_cpu() == y.is_cpu() && x.get_device_index() == y.get_device_index();
}

// Checked operands, and the tensors that own what they point at.
struct CheckedOperands {
  Tensor a;  // (B, T, p)
  Tensor b;  // (B, T, d)
  core::Operands operands;
};

inline void check_shapes(const char* op,
                         const Tensor& a,    // (B, T, p)
                         const Tensor& b) {  // (B, T, d)
  check(a.dim() == 3, op, ": a must be (B, T, p), got ", shape_of(a));
  check(b.dim() == 3, op, ": b must be (B, T, d), got ", shape_of(b));
  check(a.size(0) == b.size(0) && a.size(1) == b.size(1), op, ": a and b must agree in batch and positions, got ",
        shape_of(a), " and ", shape_of(b));
}

inline CheckedOperands checked_operands(const char* op,
                                        const Tensor& a,    // (B, T, p)
                                        const Tensor& b) {  // (B, T, d)
  check_shapes(op, a, b);
  check(same_device(a, b), op, ": a and b must be on the same device");
  const core::DType dtype = dtype_of(op, "a", a);
  check(dtype == dtype_of(op, "b", b), op, ": a and b must have the same dtype");
  CheckedOperands checked{with_unit_last_stride(a), with_unit_last_stride(b), {}};
  checked.operands = core::Operands{checked.a.const_data_ptr(),
                                    checked.b.const_data_ptr(),
                                    dtype,
                                    a.size(0),
                                    a.size(1),
                                    a.size(2),
                                    b.size(2),
                                    checked.a.stride(0),
                                    checked.a.stride(1),
                                    checked.b.stride(0),
                                    checked.b.stride(1)};
  return checked;
}

// For the CUDA kernels, see core/limits.h.
inline void check_countable(const char* op, const core::Operands& o) {
  check(core::countable(o), op,
        ": on CUDA at most 2^30 samples, positions, in-features and out-features, got B = ", o.batch,
        ", T = ", o.positions, ", p = ", o.in_features, ", d = ", o.out_features);
}

inline void check_countable(const char* op, const core::Affine& o) {
  check(core::countable(o), op, ": on CUDA at most 2^30 samples and channels and 2^36 positions of all samples, got ",
        o.batch, " samples of ", o.before, " positions and ", o.channels, " channels");
}

inline void check_countable(const char* op, const core::Convolution& c) {
  check(
      core::countable(c), op,
      ": on CUDA at most 2^30 samples, positions of a sample, channels of a group times kernel elements, and elements "
      "of a dimension with its padding, got ",
      c.batch, " samples, ", c.runs, " runs of ", c.out[0], " x ", c.out[1], " x ", c.out[2], " positions, ",
      c.group_channels(), " channels of a group, a kernel of ", c.kernel[0], " x ", c.kernel[1], " x ", c.kernel[2]);
}

// A weight per sample, in the accumulation dtype of `a` and contiguous.
inline Tensor checked_weights(const char* op,
                              const Tensor& a,          // (B, T, p)
                              const Tensor& weights) {  // (B,)
  check(weights.dim() == 1 && weights.size(0) == a.size(0), op, ": weights must be (B,) with B = ", a.size(0), ", got ",
        shape_of(weights));
  check(same_device(a, weights), op, ": weights must be on the device of a");
  check(weights.scalar_type() == accumulation_type(dtype_of(op, "a", a)), op,
        ": weights must have the accumulation dtype of a, float64 for float64 and float32 otherwise");
  return ::torch::stable::contiguous(weights);
}

struct CheckedRows {
  Tensor x;  // (B, ...)
  core::Rows rows;
};

inline CheckedRows checked_rows(const char* op, const Tensor& x) {  // (B, ...)
  check(x.dim() >= 1, op, ": x must have a batch dimension, got a scalar");
  const core::DType dtype = dtype_of(op, "x", x);
  // The elements of a row must be adjacent; rows themselves may lie anywhere.
  int64_t length = 1;
  bool adjacent = true;
  for (int64_t dim = x.dim() - 1; dim >= 1; --dim) {
    adjacent = adjacent && (x.size(dim) <= 1 || x.stride(dim) == length);
    length *= x.size(dim);
  }
  CheckedRows checked{adjacent ? x : ::torch::stable::contiguous(x), {}};
  checked.rows = core::Rows{checked.x.const_data_ptr(), dtype, x.size(0), length, checked.x.stride(0)};
  return checked;
}

struct CheckedPicks {
  Tensor b;  // (B, T, d)
  core::Picks picks;
};

inline CheckedPicks checked_picks(const char* op,
                                  const Tensor& index,  // (B, T)
                                  const Tensor& b) {    // (B, T, d)
  check(index.scalar_type() == ScalarType::Long || index.scalar_type() == ScalarType::Int, op,
        ": index must be int64 or int32, got scalar type ", static_cast<int>(index.scalar_type()));
  check(index.dim() == 2, op, ": index must be (B, T), got ", shape_of(index));
  check(b.dim() == 3, op, ": b must be (B, T, d), got ", shape_of(b));
  check(index.size(0) == b.size(0) && index.size(1) == b.size(1), op,
        ": index and b must agree in batch and positions, got ", shape_of(index), " and ", shape_of(b));
  check(same_device(index, b), op, ": index and b must be on the same device");
  check(index.size(1) <= int64_t{1} << 30, op, ": at most 2^30 positions, got ", index.size(1));
  CheckedPicks checked{with_unit_last_stride(b), {}};
  checked.picks = core::Picks{index.const_data_ptr(),
                              index.scalar_type() == ScalarType::Long,
                              checked.b.const_data_ptr(),
                              dtype_of(op, "b", b),
                              b.size(0),
                              b.size(1),
                              b.size(2),
                              index.stride(0),
                              index.stride(1),
                              checked.b.stride(0),
                              checked.b.stride(1)};
  return checked;
}

struct CheckedAffine {
  Tensor b;                          // (B, T, d, S)
  std::optional<Tensor> x;           // the same
  std::optional<Tensor> mean, rstd;  // (B, T, G)
  core::Affine affine;
};

inline CheckedAffine checked_affine(const char* op,
                                    const Tensor& b,                      // (B, T, d, S)
                                    const std::optional<Tensor>& x,       // the same
                                    const std::optional<Tensor>& mean,    // (B, T, G)
                                    const std::optional<Tensor>& rstd) {  // (B, T, G)
  check(b.dim() == 4, op, ": b must be (B, T, d, S), got ", shape_of(b));
  const core::DType dtype = dtype_of(op, "b", b);
  CheckedAffine checked{b, x, mean, rstd, {}};
  core::Affine& affine = checked.affine;
  affine = {};
  affine.dtype = dtype;
  affine.batch = b.size(0);
  affine.before = b.size(1);
  affine.channels = b.size(2);
  affine.after = b.size(3);
  affine.scaled = x.has_value();
  affine.groups = 1;
  if (x.has_value()) {
    bool same = x->dim() == 4;
    for (int64_t dim = 0; same && dim < 4; ++dim) same = x->size(dim) == b.size(dim);
    check(same, op, ": x must have the shape of b, got ", shape_of(*x), " and ", shape_of(b));
    check(dtype == dtype_of(op, "x", *x), op, ": b and x must have the same dtype");
    check(same_device(b, *x), op, ": b and x must be on the same device");
  }
  for (const std::optional<Tensor>* statistic : {&mean, &rstd}) {
    if (!statistic->has_value()) continue;
    const Tensor& given = **statistic;
    const char* name = statistic == &mean ? "mean" : "rstd";
    check(x.has_value(), op, ": ", name, " without x");
    check(given.dim() == 3 && given.size(0) == b.size(0) && given.size(1) == b.size(1) && given.size(2) > 0 &&
              b.size(2) % given.size(2) == 0,
          op, ": ", name, " must be (B, T, G) with G a divisor of d, got ", shape_of(given), " for ", shape_of(b));
    check(given.scalar_type() == accumulation_type(dtype), op, ": ", name,
          " must have the accumulation dtype of b, float64 for float64 and float32 otherwise");
    check(same_device(b, given), op, ": b and ", name, " must be on the same device");
    affine.groups = given.size(2);
  }
  if (mean.has_value() && rstd.has_value()) {
    check(mean->size(2) == rstd->size(2), op, ": mean and rstd must have the same shape, got ", shape_of(*mean),
          " and ", shape_of(*rstd));
  }

  // Which positions or channels are adjacent in memory, in both tensors?
  const bool statistics = mean.has_value() || rstd.has_value();
  const auto adjacent = [&](int64_t dim) {
    return (b.size(dim) <= 1 || b.stride(dim) == 1) && (!x.has_value() || b.size(dim) <= 1 || x->stride(dim) == 1);
  };
  int64_t before = 1, after = 3;
  if (b.size(1) == 1 && b.size(3) > 1 && !adjacent(3) && adjacent(2)) {
    std::swap(before, after);  // images with the channels last: statistics are the same for all pixels
  } else if (b.size(3) == 1 && b.size(1) > 1 && (b.size(2) <= 1 || !adjacent(2)) && adjacent(1) && !statistics) {
    std::swap(before, after);  // a transposed sequence
  } else if (!adjacent(b.size(3) == 1 ? 2 : 3)) {
    checked.b = ::torch::stable::contiguous(b);
    if (x.has_value()) checked.x = ::torch::stable::contiguous(*x);
  }
  affine.before = b.size(before);
  affine.after = b.size(after);
  affine.b = checked.b.const_data_ptr();
  affine.b_batch_stride = checked.b.stride(0);
  affine.b_before_stride = checked.b.stride(before);
  affine.b_channel_stride = checked.b.stride(2);
  if (x.has_value()) {
    affine.x = checked.x->const_data_ptr();
    affine.x_batch_stride = checked.x->stride(0);
    affine.x_before_stride = checked.x->stride(before);
    affine.x_channel_stride = checked.x->stride(2);
  }
  if (mean.has_value()) {
    affine.mean = mean->const_data_ptr();
    affine.mean_batch_stride = mean->stride(0);
    affine.mean_before_stride = before == 1 ? mean->stride(1) : 0;
    affine.mean_group_stride = mean->stride(2);
  }
  if (rstd.has_value()) {
    affine.rstd = rstd->const_data_ptr();
    affine.rstd_batch_stride = rstd->stride(0);
    affine.rstd_before_stride = before == 1 ? rstd->stride(1) : 0;
    affine.rstd_group_stride = rstd->stride(2);
  }
  return checked;
}

// The results of affine_sqnorm; those that are not asked for have no elements.
struct AffineOutputs {
  std::tuple<Tensor, Tensor, Tensor, Tensor> tensors;  // scale (d,), its norms (B,), shift (d,), its norms (B,)
  bool scaled, total;

  AffineOutputs(const CheckedAffine& checked, bool total)
      : tensors(make(checked.b, total && checked.affine.scaled, 2), make(checked.b, checked.affine.scaled, 0),
                make(checked.b, total, 2), make(checked.b, true, 0)),
        scaled(checked.affine.scaled),
        total(total) {}

  core::AffineResults results() const {
    return core::AffineResults{
        total ? std::get<0>(tensors).mutable_data_ptr() : nullptr, std::get<1>(tensors).mutable_data_ptr(),
        total ? std::get<2>(tensors).mutable_data_ptr() : nullptr, std::get<3>(tensors).mutable_data_ptr()};
  }

 private:
  static Tensor make(const Tensor& b, bool wanted, int64_t dim) {
    return ::torch::stable::new_empty(b, {wanted ? b.size(dim) : 0}, accumulation_type(dtype_of("", "", b)));
  }
};

// The gradient of x: contiguous, but for the order of samples and positions, which is that of x. The fake kernel says
// the same.
inline bool positions_first(const Tensor& x) { return x.stride(0) < x.stride(1); }

struct CheckedNormalisation {
  CheckedAffine affine;
  std::optional<Tensor> weight;  // (d,)
  Tensor gradient;               // (B, T, d, S)
  core::Normalisation normalisation;
};

inline CheckedNormalisation checked_normalisation(const char* op,
                                                  const Tensor& b,                        // (B, T, d, S)
                                                  const Tensor& x,                        // the same
                                                  const Tensor& mean,                     // (B, T, G)
                                                  const Tensor& rstd,                     // (B, T, G)
                                                  const std::optional<Tensor>& weight) {  // (d,)
  check(b.dim() == 4, op, ": b must be (B, T, d, S), got ", shape_of(b));
  check(x.dim() == 4, op, ": x must have the shape of b, got ", shape_of(x), " and ", shape_of(b));
  // Positions after the channels are adjacent, or the channels if there are none.
  const auto dense = [](const Tensor& t) {
    const int64_t dim = t.size(3) == 1 ? 2 : 3;
    return t.size(dim) <= 1 || t.stride(dim) == 1 ? t : ::torch::stable::contiguous(t);
  };
  CheckedNormalisation checked{checked_affine(op, dense(b), dense(x), mean, rstd), weight, x, {}};
  if (weight.has_value()) {
    check(weight->dim() == 1 && weight->size(0) == b.size(2), op, ": weight must be (d,) with d = ", b.size(2),
          ", got ", shape_of(*weight));
    check(weight->scalar_type() == accumulation_type(dtype_of(op, "b", b)), op,
          ": weight must have the accumulation dtype of b, float64 for float64 and float32 otherwise");
    check(same_device(b, *weight), op, ": b and weight must be on the same device");
    checked.weight = ::torch::stable::contiguous(*weight);
  }
  const bool swapped = positions_first(x);
  const Tensor gradient = ::torch::stable::new_empty(
      x, {x.size(swapped ? 1 : 0), x.size(swapped ? 0 : 1), x.size(2), x.size(3)}, x.scalar_type());
  checked.gradient = swapped ? ::torch::stable::transpose(gradient, 0, 1) : gradient;
  checked.normalisation = core::Normalisation{
      checked.affine.affine, checked.weight.has_value() ? checked.weight->const_data_ptr() : nullptr,
      checked.gradient.mutable_data_ptr(), checked.gradient.stride(0), checked.gradient.stride(1)};
  return checked;
}

struct CheckedConvolution {
  Tensor x;  // (B, R, channels, *size)
  Tensor b;  // (B, R, out_channels, *out)
  core::Convolution convolution;
};

// What else a convolution is made of: one number for each of its dimensions, and the number of groups.
struct ConvArguments {
  const std::vector<int64_t>&kernel, &stride, &padding, &dilation;
  int64_t groups;
};

// What the convolution's output has in dimension `i`. Of a transposed convolution with output padding, b may have less.
inline int64_t output_size(const core::Convolution& o, int i) {
  const int64_t room = o.size[i] + 2 * o.padding[i] - (o.kernel[i] - 1) * o.dilation[i] - 1;
  return room < 0 ? 0 : room / o.stride[i] + 1;
}

inline CheckedConvolution checked_convolution(const char* op,
                                              const Tensor& x,  // (B, R, channels, *size)
                                              const Tensor& b,  // (B, R, out_channels, *out)
                                              const ConvArguments& arguments) {
  const int64_t dims = x.dim() - 3;
  check(dims >= 1 && dims <= 3, op, ": x must be (B, R, channels, *size) with one to three dimensions of size, got ",
        shape_of(x));
  check(b.dim() == x.dim(), op, ": b must be (B, R, out_channels, *out) with as many dimensions as x, got ",
        shape_of(b));
  check(x.size(0) == b.size(0) && x.size(1) == b.size(1), op, ": x and b must agree in batch and runs, got ",
        shape_of(x), " and ", shape_of(b));
  check(same_device(x, b), op, ": x and b must be on the same device");
  const core::DType dtype = dtype_of(op, "x", x);
  check(dtype == dtype_of(op, "b", b), op, ": x and b must have the same dtype");
  const int64_t groups = arguments.groups;
  check(groups >= 1 && x.size(2) % groups == 0 && b.size(2) % groups == 0, op,
        ": groups must divide the channels of x and b, got ", groups, " groups for ", shape_of(x), " and ",
        shape_of(b));

  CheckedConvolution checked{x, b, {}};
  core::Convolution& o = checked.convolution;
  o = core::Convolution{
      x.const_data_ptr(), b.const_data_ptr(), dtype,     x.size(0), x.size(1), x.size(2), b.size(2), groups,
      {1, 1, 1},          {1, 1, 1},          {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, {},        {}};
  for (int64_t i = 0; i < 3; ++i) {
    o.x_strides[i] = x.stride(i);
    o.b_strides[i] = b.stride(i);
  }
  struct {
    const char* name;
    const std::vector<int64_t>& given;
    int64_t* to;
    int64_t least;
  } const lists[] = {{"kernel", arguments.kernel, o.kernel, 1},
                     {"stride", arguments.stride, o.stride, 1},
                     {"padding", arguments.padding, o.padding, 0},
                     {"dilation", arguments.dilation, o.dilation, 1}};
  for (const auto& list : lists) {
    check(static_cast<int64_t>(list.given.size()) == dims, op, ": ", list.name, " must have ", dims, " elements, got ",
          list.given.size());
    for (int64_t i = 0; i < dims; ++i) {
      const int64_t value = list.given[static_cast<size_t>(i)];
      check(value >= list.least, op, ": ", list.name, " must be at least ", list.least, ", got ", value);
      list.to[3 - dims + i] = value;
    }
  }
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t at = 3 - dims + i;
    o.size[at] = x.size(3 + i);
    o.out[at] = b.size(3 + i);
    o.x_strides[3 + at] = x.stride(3 + i);
    o.b_strides[3 + at] = b.stride(3 + i);
    const int64_t most = output_size(o, static_cast<int>(at));
    check(o.out[at] <= most, op, ": dimension ", 3 + i, " of b must be at most ", most,
          ", the convolution's output size, got ", shape_of(b));
  }
  return checked;
}

// The shape of the weight: (out_channels, channels / groups, *kernel).
inline std::vector<int64_t> weight_shape(const core::Convolution& o, const ConvArguments& arguments) {
  std::vector<int64_t> shape{o.out_channels, o.group_channels()};
  shape.insert(shape.end(), arguments.kernel.begin(), arguments.kernel.end());
  return shape;
}

}  // namespace ghostgrad::binding
