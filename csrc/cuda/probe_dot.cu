// probe_dot on CUDA: sum_i xi_i (plus_i - minus_i) / (2 sigma) of each tensor, bound by reading plus and minus; xi is
// drawn again.
//
// A thread adds the products of its 32 elements of a unit in float64, the block adds its threads' sums: partial
// (units,). A second kernel adds each tensor's partials, a block to a tensor. No atomics: the same inputs give the same
// bits.
#include "cuda/probe_dot.h"

#include <vector>

#include "cuda/noise.cuh"

namespace ghostgrad::cuda {
namespace {

template <class S, int kCapacity>
__global__ void __launch_bounds__(kThreads) probe_dot_kernel(const Table<2, kCapacity> table, const core::Noise noise,
                                                             double* __restrict__ partial) {  // (units,)
  for (int64_t unit = blockIdx.x; unit < table.units; unit += gridDim.x) {
    const int s = section_of(table, unit);
    const S* plus = static_cast<const S*>(table.pointers[s][0]);
    const S* minus = static_cast<const S*>(table.pointers[s][1]);
    double sum = 0.0;
    for_quads(noise, table.sections[s], unit - table.sections[s].first_unit,
              [&](int64_t element, int first, int last, const float (&xi)[kQuad]) {
                const Quad<S> above = load_quad(plus + element, first, last);
                const Quad<S> below = minus == nullptr ? Quad<S>{} : load_quad(minus + element, first, last);
#pragma unroll
                for (int i = 0; i < kQuad; ++i) {
                  sum += static_cast<double>(xi[i]) * (static_cast<double>(core::to_accumulation(above.values[i])) -
                                                       static_cast<double>(core::to_accumulation(below.values[i])));
                }
              });
    const double total = block_sum(sum);
    if (threadIdx.x == 0) partial[unit] = total;
  }
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads) add_units(const Table<2, kCapacity> table,
                                                      const double* __restrict__ partial,  // (units,)
                                                      double scale, double* __restrict__ dots) {
  for (int s = blockIdx.x; s < table.count; s += gridDim.x) {
    const int64_t first = table.sections[s].first_unit;
    const int64_t last = s + 1 < table.count ? table.sections[s + 1].first_unit : table.units;
    double sum = 0.0;
    for (int64_t unit = first + threadIdx.x; unit < last; unit += kThreads) sum += partial[unit];
    const double total = block_sum(sum);
    if (threadIdx.x == 0) dots[table.sections[s].slot] = total / scale;
  }
}

template <class S>
cudaError_t run(const core::Section* sections, const void* const* plus, const void* const* minus, int64_t count,
                const core::Noise& noise, double sigma, double* dots, void* workspace, cudaStream_t stream) {
  struct Pair {
    void* pointers[2];
  };
  std::vector<Pair> pairs(static_cast<size_t>(count));
  for (int64_t s = 0; s < count; ++s) {
    pairs[static_cast<size_t>(s)] =
        Pair{{const_cast<void*>(plus[s]), minus == nullptr ? nullptr : const_cast<void*>(minus[s])}};
  }
  double* partial = static_cast<double*>(workspace);
  const auto launch_table = [&](const auto& table, int64_t) {
    constexpr int kCapacity = sizeof(table.pointers) / sizeof(table.pointers[0]);
    GHOSTGRAD_TRY(
        launch(probe_dot_kernel<S, kCapacity>, Launch{grid_for(table.units), kThreads}, stream, table, noise, partial));
    GHOSTGRAD_TRY(
        launch(add_units<kCapacity>, Launch{table.count, kThreads}, stream, table, partial, 2.0 * sigma, dots));
    partial += table.units;
    return cudaSuccess;
  };
  return for_tables<2>(sections, count, reinterpret_cast<void* const(*)[2]>(pairs.data()), launch_table);
}

}  // namespace

int64_t probe_dot_workspace(const core::Section* sections, int64_t count) {
  int64_t units = 0;
  for (int64_t s = 0; s < count; ++s) units += core::units(sections[s], kUnit);
  return units * static_cast<int64_t>(sizeof(double));
}

cudaError_t launch_probe_dot(core::DType dtype, const core::Section* sections, const void* const* plus,
                             const void* const* minus, int64_t count, const core::Noise& noise, double sigma,
                             double* dots, void* workspace, cudaStream_t stream) {
  GHOSTGRAD_FOR_DTYPE(dtype, run, sections, plus, minus, count, noise, sigma, dots, workspace, stream)
  return cudaErrorInvalidValue;
}

}  // namespace ghostgrad::cuda
