// Stands in for CUDA's header of this name, so that g++ can compile the kernels and run them without a GPU: see
// threads.h for how. Kernels find the words of CUDA C++ here and everything else in cuda/primitives.cuh.
//
// What it is for: tests/kernels/test_emulated.cpp runs every kernel and compares the results with the CPU's. Wrong
// indices, tails, fragments, missing or divergent barriers and waits go red here, accesses out of bounds or misaligned
// with the sanitizers. What it cannot see: registers, bank conflicts, speed, and what differs between kinds of memory.
#pragma once

#include <cstdint>

#include "threads.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local  // threads.h says why
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaMallocManaged(void** memory, size_t bytes) { return *memory = std::malloc(bytes), cudaSuccess; }
inline cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

#define threadIdx (::emulation::thread_index)
#define blockIdx (::emulation::block_index)
#define blockDim (::emulation::block_size)
#define gridDim (::emulation::grid_size)

inline void __syncthreads() {
  emulation::arrive_and_wait("__syncthreads", emulation::barriers[0], emulation::thread_count);
}

namespace emulation {

// The value of lane `source`, or the lane's own if there is no such lane.
template <class T>
T shuffle(const char* name, unsigned mask, T value, int source) {
  if (mask != 0xffffffffu) fail("%s of a part of a warp", name);
  struct Operands {
    T value, result;
    int source;
  } mine{value, value, source};
  together<kLanes>(name, mine, [](Operands** lanes) {
    for (int i = 0; i < kLanes; ++i) {
      const int source = lanes[i]->source;
      if (source >= 0 && source < kLanes) lanes[i]->result = lanes[source]->value;
    }
  });
  return mine.result;
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::shuffle("__shfl_sync", mask, value, source & 31);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  return emulation::shuffle("__shfl_down_sync", mask, value, emulation::current % 32 + static_cast<int>(offset));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return emulation::shuffle("__shfl_xor_sync", mask, value, (emulation::current % 32) ^ lane_mask);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::shuffle("__syncwarp", mask, 0, 0); }
