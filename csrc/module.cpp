// The Python module ghostgrad._C: what is not a tensor computation.
//
// Why both this file and csrc/torch/library.cpp? Whatever touches a tensor is a registered op, for only so do autograd,
// fake tensors, torch.compile and profilers see it; importing this module runs those registrations. What is left are
// facts about the build and pure functions of shapes, which an op cannot take or return: they are bound here, with
// pybind11, and this is the only file that includes it. No function has two doors.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "core/plan.h"
#include "cpu/ops.h"
#include "module.h"

namespace py = pybind11;

// torch._C._get_fp32_precision_getter, found when the module is imported. It lives as long as the process does: an op
// may run later than the interpreter takes objects apart.
static PyObject* fp32_precision = nullptr;

static bool rounds_to_tf32(const char* op) {
  const py::gil_scoped_acquire held;  // ops run without it
  return py::reinterpret_borrow<py::object>(fp32_precision)("cuda", op).cast<std::string>() == "tf32";
}

bool ghostgrad::tf32_in_matmul() { return rounds_to_tf32("matmul"); }
bool ghostgrad::tf32_in_conv() { return rounds_to_tf32("conv"); }

namespace {

using namespace ghostgrad;

core::DType dtype_named(const std::string& name) {
  if (name == "float32") return core::DType::kFloat32;
  if (name == "float64") return core::DType::kFloat64;
  if (name == "bfloat16") return core::DType::kBFloat16;
  if (name == "float16") return core::DType::kFloat16;
  throw std::invalid_argument("plan: dtype must be float32, float64, bfloat16 or float16, got " + name);
}

const char* name_of(core::Norm norm) {
  switch (norm) {
    case core::Norm::kRow:
      return "row";
    case core::Norm::kGram:
      return "gram";
    case core::Norm::kOuter:
      return "outer";
    case core::Norm::kFused:
      break;
  }
  return "fused";
}

std::string name_of(core::Wgrad wgrad) {
  switch (wgrad) {
    case core::Wgrad::kNone:
      return "";
    case core::Wgrad::kMatmul:
      return "matmul";
    case core::Wgrad::kProduct:
      return "product";
    case core::Wgrad::kFused:
      break;
  }
  return "fused";
}

core::Machine machine_of(const std::string& device) { return device == "cuda" ? core::Machine::kCuda : cpu::machine(); }

py::tuple plan(int64_t B, int64_t T, int64_t p, int64_t d, const std::string& dtype, const std::string& device,
               bool wgrad) {
  const core::Plan chosen = core::plan(core::Problem{B, T, p, d, dtype_named(dtype), machine_of(device), wgrad});
  return py::make_tuple(name_of(chosen.norm), chosen.flops, 1e-9 * chosen.time, name_of(chosen.wgrad));
}

py::tuple conv_plan(int64_t B, int64_t T, int64_t p, int64_t d, int64_t groups, const std::string& dtype,
                    const std::string& device, bool wgrad) {
  const core::Plan chosen =
      core::conv_plan(core::ConvProblem{B, T, p, d, groups, dtype_named(dtype), machine_of(device), wgrad});
  return py::make_tuple(name_of(chosen.norm), chosen.flops, 1e-9 * chosen.time, name_of(chosen.wgrad));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and pure functions; importing it registers the ops of torch.ops.ghostgrad.";
#if defined(GHOSTGRAD_WITH_CUDA)
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  m.attr("cuda_archs") = GHOSTGRAD_CUDA_ARCHS;
  fp32_precision = py::object(py::module_::import("torch._C").attr("_get_fp32_precision_getter")).release().ptr();
  m.def("tf32_in_matmul", &tf32_in_matmul, "Whether float32 products on a GPU round their operands to tf32.");
  m.def("tf32_in_conv", &tf32_in_conv, "The same for convolutions.");
  m.def(
      "cpu_capability", [] { return std::string(cpu::name_of(cpu::capability())); },
      "The instruction set that the CPU kernels run with: portable, avx2, avx512 or avx512bf16.");
  m.def("plan", &plan, py::arg("B"), py::arg("T"), py::arg("p"), py::arg("d"), py::arg("dtype"), py::arg("device"),
        py::arg("wgrad"),
        "The formula chosen for a layer's squared norms, its floating-point operations, seconds, and where the weight "
        "gradient comes from.");
  m.def(
      "product_seconds",
      [](double flops, const std::string& dtype, const std::string& device) {
        return 1e-9 * flops / core::speeds(dtype_named(dtype), machine_of(device)).matmul;
      },
      py::arg("flops"), py::arg("dtype"), py::arg("device"), "What the plan expects of PyTorch's own matrix product.");
  m.def("conv_plan", &conv_plan, py::arg("B"), py::arg("T"), py::arg("p"), py::arg("d"), py::arg("groups"),
        py::arg("dtype"), py::arg("device"), py::arg("wgrad"), "The same for a convolution's weight.");
}
