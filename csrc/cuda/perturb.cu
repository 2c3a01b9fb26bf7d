// perturb_ on CUDA: w <- w + sigma * xi for all tensors in one launch, bound by reading and writing w.
#include "cuda/perturb.h"

#include "cuda/noise.cuh"

namespace ghostgrad::cuda {
namespace {

template <class S, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    perturb_kernel(const Table<1, kCapacity> table, const core::Noise noise, const core::accumulation_t<S> sigma) {
  for (int64_t unit = blockIdx.x; unit < table.units; unit += gridDim.x) {
    const int s = section_of(table, unit);
    S* w = static_cast<S*>(table.pointers[s][0]);
    for_quads(noise, table.sections[s], unit - table.sections[s].first_unit,
              [&](int64_t element, int first, int last, const float (&xi)[kQuad]) {
                Quad<S> quad = load_quad(w + element, first, last);
#pragma unroll
                for (int i = 0; i < kQuad; ++i) {
                  const auto value = core::to_accumulation(quad.values[i]);
                  quad.values[i] = core::from_accumulation<S>(core::perturbed(value, sigma, xi[i]));
                }
                store_quad(w + element, quad, first, last);
              });
  }
}

template <class S>
cudaError_t run(const core::Section* sections, void* const* params, int64_t count, const core::Noise& noise,
                double sigma, cudaStream_t stream) {
  const auto launch_table = [&](const auto& table, int64_t) {
    constexpr int kCapacity = sizeof(table.pointers) / sizeof(table.pointers[0]);
    return launch(perturb_kernel<S, kCapacity>, Launch{grid_for(table.units), kThreads}, stream, table, noise,
                  static_cast<core::accumulation_t<S>>(sigma));
  };
  return for_tables<1>(sections, count, reinterpret_cast<void* const(*)[1]>(params), launch_table);
}

}  // namespace

cudaError_t launch_perturb(core::DType dtype, const core::Section* sections, void* const* params, int64_t count,
                           const core::Noise& noise, double sigma, cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(dtype, run, sections, params, count, noise, sigma, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
