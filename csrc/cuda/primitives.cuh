// What the kernels ask of the hardware beyond plain CUDA C++: launches, asynchronous copies, matrix fragments and
// tensor cores, all of which any GPU from sm_80 on has. hopper.cuh has what sm_90a adds.
//
// tests/kernels/emulation/cuda has headers of the same names and with the same declarations for the CPU, where the
// kernels' tests run. A kernel that uses nothing but threadIdx, blockIdx, gridDim, __shared__, __syncthreads, shuffles
// and these headers runs there unchanged.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"

namespace ghostgrad::cuda {

// --- launches ---

struct Launch {
  int blocks;
  int threads;           // of a block
  int shared_bytes = 0;  // of dynamic shared memory, see dynamic_shared()
};

// kernel<<<...>>>(arguments...) as a function that returns CUDA's error. More than 48 KiB of shared memory are asked
// for here.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& shape, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  return [&](Parameters... parameters) {  // by value and converted, as a kernel takes them
    void* pointers[] = {&parameters...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(shape.blocks)),
                            dim3(static_cast<unsigned>(shape.threads)), pointers,
                            static_cast<size_t>(shape.shared_bytes), stream);
  }(arguments...);
}

// The block's dynamic shared memory, aligned to 1024 bytes as swizzled tiles need it.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// --- asynchronous copies, sm_80 ---
//
// A copy reaches shared memory at some time until its thread has waited for the group that it was committed with; other
// threads see it after a barrier that follows.

// Copies the first `bytes` of kBytes (4, 8 or 16, to which both ends are aligned) and fills the rest with zeros. Of
// nothing, nothing is read: `global` may then be any address.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async can copy");
  if constexpr (kBytes == 16) {  // past the first-level cache: tiles are shared by blocks, not by a block's threads
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the latest kPending groups of this thread have arrived.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- matrix fragments and tensor cores, sm_80 ---
//
// All threads of a warp call these together. With g = lane / 4 and q = lane % 4, the fragments of d (16 x 8) += a (16 x
// K) b (K x 8) are
//
//   d[0], d[1]  row g, columns 2 q and 2 q + 1           d[2], d[3]  the same of row g + 8
//
//   16-bit elements, K = 16, two to a register, the lower half first:
//     a[0]  row g, k = 2 q, 2 q + 1      a[1]  row g + 8      a[2], a[3]  the same at k + 8
//     b[0]  k = 2 q, 2 q + 1, column g   b[1]  the same at k + 8
//
//   tf32, K = 8, one to a register:
//     a[0]  row g, k = q                 a[1]  row g + 8      a[2], a[3]  the same at k + 4
//     b[0]  k = q, column g              b[1]  the same at k + 4

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane l says where row l % 8 of matrix l / 8 is: 16 bytes,
// aligned. Register i of lane l receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices: elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4) of matrix i.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

struct TF32 {};  // float32 operands of which the tensor cores read 10 bits of mantissa; float32 sums

// The bits of a value rounded to tf32, to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// d += a b for operands of type S: BFloat16, Float16 or TF32.
template <class S>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define GHOSTGRAD_MULTIPLY_ADD(S, INSTRUCTION)                                                                     \
  template <>                                                                                                      \
  __device__ __forceinline__ void multiply_add<S>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                    \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
  }
GHOSTGRAD_MULTIPLY_ADD(core::BFloat16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
GHOSTGRAD_MULTIPLY_ADD(core::Float16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
GHOSTGRAD_MULTIPLY_ADD(TF32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef GHOSTGRAD_MULTIPLY_ADD

}  // namespace ghostgrad::cuda
