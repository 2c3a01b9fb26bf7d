// What the bindings of the noise ops share: lists of tensors that are parts of parameters become sections and pointers.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "core/noise.h"
#include "core/nso.h"
#include "core/sections.h"
#include "torch/check.h"

namespace ghostgrad::binding {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

inline core::Noise checked_noise(const char* op, int64_t seed, const std::string& distribution) {
  check(seed >= 0, op, ": seed must not be negative, got ", seed);
  const char* names[] = {"rademacher", "normal", "uniform"};
  for (int number = 0; number < 3; ++number) {
    if (distribution == names[number]) {
      return core::Noise{static_cast<uint64_t>(seed), static_cast<core::Distribution>(number)};
    }
  }
  check(false, op, ": distribution must be rademacher, normal or uniform, got ", distribution);
  return {};
}

inline void check_sigma(const char* op, double sigma, bool zero) {
  check(std::isfinite(sigma) && (zero || sigma != 0.0), op, ": sigma must be finite", zero ? "" : " and not zero",
        ", got ", sigma);
}

inline void check_same_devices(const char* op, const char* argument, const Tensors& tensors) {
  for (size_t i = 1; i < tensors.size(); ++i) {
    check(same_device(tensors[0], tensors[i]), op, ": ", argument, " must be on one device, but number ", i,
          " is not where number 0 is");
  }
}

// One list of tensors beside another: as many, of the same shapes and dtypes, on the same device.
inline void check_alike(const char* op, const char* name, const Tensors& tensors, const char* other_name,
                        const Tensors& others) {
  check(tensors.size() == others.size(), op, ": ", name, " and ", other_name, " must be equally many, got ",
        tensors.size(), " and ", others.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    bool alike = tensors[i].dim() == others[i].dim();
    for (int64_t dim = 0; alike && dim < tensors[i].dim(); ++dim) alike = tensors[i].size(dim) == others[i].size(dim);
    check(alike, op, ": ", name, " and ", other_name, " must have the same shapes, got ", shape_of(tensors[i]), " and ",
          shape_of(others[i]), " at number ", i);
    check(tensors[i].scalar_type() == others[i].scalar_type(), op, ": ", name, " and ", other_name,
          " must have the same dtypes, but differ at number ", i);
    check(same_device(tensors[i], others[i]), op, ": ", name, " and ", other_name,
          " must be on the same device, but differ at number ", i);
  }
}

inline int64_t element_bytes(core::DType dtype) {
  return dtype == core::DType::kFloat64 ? 8 : dtype == core::DType::kFloat32 ? 4 : 2;
}

// What is changed in place must not be changed twice: no element of memory may belong to two tensors, or to one twice.
inline void check_disjoint(const char* op, const char* argument, const Tensors& tensors) {
  std::vector<std::array<int64_t, 3>> extents;  // first byte, end, number
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel() == 0) continue;
    int64_t last = 0;
    for (int64_t dim = 0; dim < tensors[i].dim(); ++dim) {
      check(tensors[i].size(dim) <= 1 || tensors[i].stride(dim) != 0, op, ": ", argument, " number ", i,
            " is expanded: several of its elements are one in memory");
      last += (tensors[i].size(dim) - 1) * tensors[i].stride(dim);
    }
    const int64_t first = static_cast<int64_t>(reinterpret_cast<intptr_t>(tensors[i].const_data_ptr()));
    extents.push_back(
        {first, first + (last + 1) * element_bytes(dtype_of(op, argument, tensors[i])), static_cast<int64_t>(i)});
  }
  std::sort(extents.begin(), extents.end());
  for (size_t k = 1; k < extents.size(); ++k) {
    check(extents[k - 1][1] <= extents[k][0], op, ": ", argument, " number ",
          std::min(extents[k - 1][2], extents[k][2]), " and number ", std::max(extents[k - 1][2], extents[k][2]),
          " share memory: give each parameter once");
  }
}

// blocks: number, offset, run and pitch of each tensor; without them tensor i is the whole of parameter i.
inline std::vector<core::Section> checked_sections(const char* op, const Tensors& tensors,
                                                   const std::optional<Integers>& blocks) {
  check(!blocks.has_value() || blocks->size() == 4 * tensors.size(), op,
        ": blocks must have four numbers for each tensor, got ", blocks.has_value() ? blocks->size() : 0, " for ",
        tensors.size());
  std::vector<core::Section> sections;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t elements = tensors[i].numel();
    int64_t number = static_cast<int64_t>(i), offset = 0, run = elements, pitch = elements;
    if (blocks.has_value()) {
      const int64_t* block = blocks->data() + 4 * i;
      number = block[0], offset = block[1], run = block[2], pitch = block[3];
      check(number >= 0 && number <= 0xffffffffll, op, ": the number of a parameter must be in [0, 2^32), got ", number,
            " for tensor ", i);
      check(offset >= 0, op, ": offset must not be negative, got ", offset, " for tensor ", i);
      check(elements == 0 || (run > 0 && elements % run == 0 && (run == elements || pitch >= run)), op,
            ": run must divide the elements of a tensor and pitch must not be less, got run ", run, " and pitch ",
            pitch, " for tensor ", i, " of ", elements, " elements");
    }
    sections.push_back(
        core::Section{elements, static_cast<uint32_t>(number), static_cast<int32_t>(i), offset, run, pitch, 0});
  }
  return sections;
}

// The tensors, copied where their elements do not lie in order.
inline Tensors in_order(const Tensors& tensors) {
  Tensors ordered;
  for (const Tensor& tensor : tensors) {
    ordered.push_back(tensor.is_contiguous() ? tensor : ::torch::stable::contiguous(tensor));
  }
  return ordered;
}
// Copies changed in place go back to where they came from.
inline void put_back(const Tensors& tensors, const Tensors& ordered) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].is_contiguous()) continue;
    Tensor to = tensors[i];
    ::torch::stable::copy_(to, ordered[i]);
  }
}

// Calls use(dtype, chosen) for each dtype that occurs, with the places of its tensors.
template <class Use>
void for_dtypes(const char* op, const char* argument, const Tensors& tensors, const Use& use) {
  std::array<std::vector<size_t>, 4> chosen;
  for (size_t i = 0; i < tensors.size(); ++i) {
    chosen[static_cast<size_t>(dtype_of(op, argument, tensors[i]))].push_back(i);
  }
  for (size_t dtype = 0; dtype < chosen.size(); ++dtype) {
    if (!chosen[dtype].empty()) use(static_cast<core::DType>(dtype), chosen[dtype]);
  }
}
template <class T>
std::vector<T> pick(const std::vector<T>& all, const std::vector<size_t>& chosen) {
  std::vector<T> picked;
  for (size_t i : chosen) picked.push_back(all[i]);
  return picked;
}
inline std::vector<void*> mutable_pointers(const Tensors& tensors, const std::vector<size_t>& chosen) {
  std::vector<void*> pointers;
  for (size_t i : chosen) pointers.push_back(tensors[i].mutable_data_ptr());
  return pointers;
}
inline std::vector<const void*> const_pointers(const Tensors& tensors, const std::vector<size_t>& chosen) {
  std::vector<const void*> pointers;
  for (size_t i : chosen) pointers.push_back(tensors[i].const_data_ptr());
  return pointers;
}

// --- the ops, up to the kernel that they call ---

// run(dtype, sections, params, count, noise, sigma)
template <class Run>
void perturb(const Tensors& params, int64_t seed, double sigma, const std::string& distribution,
             const std::optional<Integers>& blocks, const Run& run) {
  const char* op = "perturb_";
  const core::Noise noise = checked_noise(op, seed, distribution);
  check_sigma(op, sigma, true);
  check_same_devices(op, "params", params);
  check_disjoint(op, "params", params);
  const std::vector<core::Section> sections = checked_sections(op, params, blocks);
  const Tensors ordered = in_order(params);
  for_dtypes(op, "params", ordered, [&](core::DType dtype, const std::vector<size_t>& chosen) {
    std::vector<core::Section> picked = pick(sections, chosen);
    run(dtype, picked.data(), mutable_pointers(ordered, chosen).data(), static_cast<int64_t>(chosen.size()), noise,
        sigma);
  });
  put_back(params, ordered);
}

// run(dtype, sections, plus, minus, count, noise, sigma, dots); returns (count,)
template <class Run>
Tensor probe_dot(const Tensors& plus, const std::optional<Tensors>& minus, int64_t seed, double sigma,
                 const std::string& distribution, const std::optional<Integers>& blocks, const Run& run) {
  const char* op = "probe_dot";
  const core::Noise noise = checked_noise(op, seed, distribution);
  check_sigma(op, sigma, false);
  check(!plus.empty(), op, ": plus must have at least one tensor");
  check_same_devices(op, "plus", plus);
  if (minus.has_value()) check_alike(op, "plus", plus, "minus", *minus);
  const std::vector<core::Section> sections = checked_sections(op, plus, blocks);
  const Tensors above = in_order(plus), below = minus.has_value() ? in_order(*minus) : Tensors{};
  Tensor dots = ::torch::stable::new_zeros(plus[0], {static_cast<int64_t>(plus.size())}, ScalarType::Double);
  for_dtypes(op, "plus", above, [&](core::DType dtype, const std::vector<size_t>& chosen) {
    std::vector<core::Section> picked = pick(sections, chosen);
    const std::vector<const void*> of_above = const_pointers(above, chosen),
                                   of_below =
                                       minus.has_value() ? const_pointers(below, chosen) : std::vector<const void*>{};
    run(dtype, picked.data(), of_above.data(), minus.has_value() ? of_below.data() : nullptr,
        static_cast<int64_t>(chosen.size()), noise, sigma, static_cast<double*>(dots.mutable_data_ptr()));
  });
  return dots;  // (len(plus),)
}

// run(dtype, sections, tensors, count, step)
template <class Run>
void nso_step(const Tensors& params, const Tensors& grads, const Tensors& centre, const Tensors& momenta,
              const core::NsoStep& step, const Run& run) {
  const char* op = "nso_step_";
  check(std::isfinite(step.lr) && std::isfinite(step.mix) && std::isfinite(step.momentum) &&
            std::isfinite(step.dampening) && std::isfinite(step.weight_decay),
        op, ": lr, mix, momentum, dampening and weight_decay must be finite");
  check(step.passes > 0, op, ": passes must be positive, got ", step.passes);
  check(!centre.empty() || step.mix == 0.0 || params.empty(), op, ": mix is ", step.mix,
        ", but there are no gradients of the centre");
  check(momenta.empty() == (step.momentum == 0.0) || params.empty(), op,
        ": momenta must be given with a momentum, and only then, got ", momenta.size(), " and momentum ",
        step.momentum);
  check(!step.nesterov || (step.momentum != 0.0 && step.dampening == 0.0), op,
        ": nesterov needs a momentum and no dampening");
  check_same_devices(op, "params", params);
  check_alike(op, "params", params, "grads", grads);
  if (!centre.empty()) check_alike(op, "params", params, "centre", centre);
  if (!momenta.empty()) check_alike(op, "params", params, "momenta", momenta);
  Tensors changed = params;
  changed.insert(changed.end(), momenta.begin(), momenta.end());
  check_disjoint(op, "params and momenta", changed);
  const std::vector<core::Section> sections = checked_sections(op, params, std::nullopt);
  const Tensors w = in_order(params), g = in_order(grads), c = in_order(centre), m = in_order(momenta);
  for_dtypes(op, "params", w, [&](core::DType dtype, const std::vector<size_t>& chosen) {
    std::vector<core::Section> picked = pick(sections, chosen);
    std::vector<core::NsoTensor> tensors;
    for (size_t i : chosen) {
      tensors.push_back(core::NsoTensor{w[i].mutable_data_ptr(), g[i].const_data_ptr(),
                                        c.empty() ? nullptr : c[i].const_data_ptr(),
                                        m.empty() ? nullptr : m[i].mutable_data_ptr()});
    }
    run(dtype, picked.data(), tensors.data(), static_cast<int64_t>(chosen.size()), step);
  });
  put_back(params, w);
  put_back(momenta, m);
}

// run(dtype, plus, zero, minus, count, differences); returns (B,)
template <class Run>
Tensor second_difference(const Tensor& plus, const Tensor& zero, const Tensor& minus, double sigma, const Run& run) {
  const char* op = "second_difference";
  check_sigma(op, sigma, false);
  check(plus.dim() == 1, op, ": plus must be (B,), got ", shape_of(plus));
  check_alike(op, "plus", {plus}, "zero", {zero});
  check_alike(op, "plus", {plus}, "minus", {minus});
  const Tensors ordered = in_order({plus, zero, minus});
  Tensor differences = ::torch::stable::new_empty(plus, {plus.size(0)}, ScalarType::Double);
  run(dtype_of(op, "plus", plus), ordered[0].const_data_ptr(), ordered[1].const_data_ptr(), ordered[2].const_data_ptr(),
      plus.size(0), sigma, static_cast<double*>(differences.mutable_data_ptr()));
  return differences;  // (B,)
}

}  // namespace ghostgrad::binding
