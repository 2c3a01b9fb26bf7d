// csrc/cuda/hopper.cuh for the CPU: the same declarations over the emulation. What they mean is said there.
#pragma once

#include "cuda/primitives.cuh"

#define __grid_constant__

namespace ghostgrad::cuda {

inline bool has_warpgroups() { return false; }
inline int multiprocessors() { return 3; }

struct TensorMap {};
inline bool make_tensor_map(TensorMap&, core::DType, const void*, const int64_t (&)[3], const int64_t (&)[2], int) {
  return false;
}

struct Barrier {
  uint64_t state;
};
inline void init_barrier(Barrier&, int) {}
inline void publish_barriers() {}
inline void arrive(Barrier&) {}
inline void arrive_and_expect(Barrier&, int) {}
inline void wait_for_phase(Barrier&, bool) {}
inline void copy_box(void*, const TensorMap&, int, int, int, Barrier&) {}
template <int kCount>
void give_registers_back() {}
template <int kCount>
void take_registers() {}
inline void begin_products() {}
inline void commit_products() {}
template <class S, int kSums>
void multiply_boxes(float (&)[kSums], const void*, const void*, int, bool) {}
template <int kPending, int kSums>
void wait_for_products(float (&)[kSums]) {}

}  // namespace ghostgrad::cuda
