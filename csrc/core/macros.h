// The one macro that lets a function be shared by host and device code.
//
// Under nvcc it is a forced-inline __host__ __device__ function. Under a C++ compiler it is forced inline for a reason
// of its own: the CPU kernels are compiled once per instruction set, and a function with an out-of-line copy could be
// merged by the linker into code for a machine that lacks the instructions. See Note [One translation unit per
// instruction set] in csrc/cpu/simd.h.
#pragma once

#if defined(__CUDACC__)
#define GHOSTGRAD_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define GHOSTGRAD_HD inline __attribute__((always_inline))
#else
#define GHOSTGRAD_HD inline
#endif
