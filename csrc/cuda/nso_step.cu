// nso_step_ on CUDA: the mean of the perturbed gradients and the step of SGD for all tensors in one launch, each
// element read and written once. A block owns kUnit elements of one tensor at a time, a thread four of them eight
// times.
#include "cuda/nso_step.h"

#include "cuda/noise.cuh"

namespace ghostgrad::cuda {
namespace {

struct Arithmetic {
#if defined(__CUDA_ARCH__)
  static GHOSTGRAD_HD float fused(float x, float a, float y) { return __fmaf_rn(x, a, y); }
  static GHOSTGRAD_HD double fused(double x, double a, double y) { return __fma_rn(x, a, y); }
  static GHOSTGRAD_HD float scaled(float x, float a) { return __fmul_rn(x, a); }
  static GHOSTGRAD_HD double scaled(double x, double a) { return __dmul_rn(x, a); }
#else
  template <class A>
  static GHOSTGRAD_HD A fused(A x, A a, A y) {
    return x * a + y;
  }
  template <class A>
  static GHOSTGRAD_HD A scaled(A x, A a) {
    return x * a;
  }
#endif
};

template <class S, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    nso_step_kernel(const Table<4, kCapacity> table, const core::NsoFactors<core::accumulation_t<S>> factors) {
  using A = core::accumulation_t<S>;
  for (int64_t unit = blockIdx.x; unit < table.units; unit += gridDim.x) {
    const int s = section_of(table, unit);
    S* w = static_cast<S*>(table.pointers[s][0]);
    const S* grads = static_cast<const S*>(table.pointers[s][1]);
    const S* centre = static_cast<const S*>(table.pointers[s][2]);
    S* momentum = static_cast<S*>(table.pointers[s][3]);
    const core::Span span = core::span_of(table.sections[s], unit - table.sections[s].first_unit, kUnit);
    for (int64_t e = span.local + threadIdx.x * kQuad; e < span.local + span.end - span.begin; e += kThreads * kQuad) {
      const int last = static_cast<int>(core::minimum(span.local + span.end - span.begin - e, kQuad));
      Quad<S> value = load_quad(w + e, 0, last), velocity{};
      const Quad<S> perturbed = load_quad(grads + e, 0, last);
      const Quad<S> at_centre = centre == nullptr ? Quad<S>{} : load_quad(centre + e, 0, last);
      if (momentum != nullptr && !factors.first) velocity = load_quad(momentum + e, 0, last);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        A wide = core::to_accumulation(value.values[i]), wide_velocity = core::to_accumulation(velocity.values[i]);
        core::nso_update<Arithmetic>(factors, centre != nullptr, momentum != nullptr,
                                     core::to_accumulation(perturbed.values[i]),
                                     core::to_accumulation(at_centre.values[i]), wide, wide_velocity);
        value.values[i] = core::from_accumulation<S>(wide);
        velocity.values[i] = core::from_accumulation<S>(wide_velocity);
      }
      store_quad(w + e, value, 0, last);
      if (momentum != nullptr) store_quad(momentum + e, velocity, 0, last);
    }
  }
}

template <class S>
cudaError_t run(const core::Section* sections, const core::NsoTensor* tensors, int64_t count, const core::NsoStep& step,
                cudaStream_t stream) {
  const core::NsoFactors<core::accumulation_t<S>> factors(step);
  const auto launch_table = [&](const auto& table, int64_t) {
    constexpr int kCapacity = sizeof(table.pointers) / sizeof(table.pointers[0]);
    return launch(nso_step_kernel<S, kCapacity>, Launch{grid_for(table.units), kThreads}, stream, table, factors);
  };
  static_assert(sizeof(core::NsoTensor) == 4 * sizeof(void*), "four pointers, in this order");
  return for_tables<4>(sections, count, reinterpret_cast<void* const(*)[4]>(tensors), launch_table);
}

}  // namespace

cudaError_t launch_nso_step(core::DType dtype, const core::Section* sections, const core::NsoTensor* tensors,
                            int64_t count, const core::NsoStep& step, cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(dtype, run, sections, tensors, count, step, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
