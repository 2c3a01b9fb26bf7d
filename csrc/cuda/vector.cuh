// Sixteen bytes at a time, and the teams of threads that share what they read: for kernels that are bound by memory.
//
// On an H100 memory is busy once about 32 KiB are on their way to each multiprocessor. With 1024 threads there, half of
// what it can hold, that is two loads of 16 bytes in flight per thread.
#pragma once

#include "cuda/device.cuh"

namespace ghostgrad::cuda {

inline int64_t element_bytes(core::DType dtype) {
  return dtype == core::DType::kFloat64 ? 8 : dtype == core::DType::kFloat32 ? 4 : 2;
}

template <class S>
constexpr int kVector = 16 / static_cast<int>(sizeof(S));  // elements of 16 bytes

// kCount adjacent elements, copied as a whole: one instruction for each 16 bytes.
template <class S, int kCount>
struct alignas(kCount * sizeof(S) < 16 ? kCount * sizeof(S) : 16) Pack {
  S element[kCount];
};
template <int kCount, class S>
__device__ __forceinline__ Pack<S, kCount> load(const S* at) {
  return *reinterpret_cast<const Pack<S, kCount>*>(at);
}
template <class S, int kCount>
__device__ __forceinline__ void store(S* at, const Pack<S, kCount>& pack) {
  *reinterpret_cast<Pack<S, kCount>*>(at) = pack;
}

// Makes the compiler read `pack` anew from here on, instead of keeping in registers what it made of it before.
template <class S, int kCount>
__device__ __forceinline__ void forget(Pack<S, kCount>& pack) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(pack) >= 4) {
    uint32_t words[sizeof(pack) / 4];
    memcpy(words, &pack, sizeof(pack));
#pragma unroll
    for (uint32_t& word : words) asm volatile("" : "+r"(word));
    memcpy(&pack, words, sizeof(pack));
  }
#else
  static_cast<void>(pack);
#endif
}

GHOSTGRAD_HD int64_t address(const void* at) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(at)); }

// [0, length) of arrays as vectors, with what comes before the first 16-byte boundary and after the last one. Arrays
// that meet the boundary at different elements have no vectors.
struct Span {
  int64_t head, vectors, tail;  // elements [0, head), then vectors, then elements [tail, length)
};
template <class S>
__device__ __forceinline__ Span span_of(int64_t length, const S* array, const S* same, const S* too) {
  constexpr int kBytes = 16;
  const int phase = static_cast<int>(address(array) % kBytes);
  if (phase != static_cast<int>(address(same) % kBytes) || phase != static_cast<int>(address(too) % kBytes)) {
    return Span{length, 0, length};
  }
  const int64_t head = core::minimum(length, (kBytes - phase) % kBytes / static_cast<int>(sizeof(S)));
  const int64_t vectors = (length - head) / kVector<S>;
  return Span{head, vectors, head + vectors * kVector<S>};
}

// n / by, neither negative: a division of 32 bits, a fifth of the instructions of one of 64, where that is enough.
__device__ __forceinline__ int64_t quotient(int64_t n, int64_t by) {
  if (((n | by) >> 32) == 0) return static_cast<uint32_t>(n) / static_cast<uint32_t>(by);
  return n / by;
}

// The smallest power of two that is at least n, from 1 to `limit`.
inline int power_of_two(int64_t n, int limit) {
  int power = 1;
  while (power < limit && power < n) power *= 2;
  return power;
}

// The sum of `value` over a team of `lanes` threads, in each of them; a power of two, at most a warp. All threads of
// the warp call it. Every lane adds the same pairs: the same bits in all of them.
template <class A>
__device__ __forceinline__ A team_sum(A value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The same of kCount values and of larger teams, of whole warps. Sums of warps pass through `exchange`: two buffers of
// kCount values per warp; calls one after the other have `turn` 0 and 1, so that one barrier is enough. All threads of
// the block call it.
template <class A, int kCount>
__device__ __forceinline__ void team_sums(A (&values)[kCount], int lanes, A* exchange, int turn) {
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = lanes / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = team_sum(values[i], lanes < 32 ? lanes : 32);
  if (warps <= 1) return;
  A* sums = exchange + turn * 32 * kCount;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[warp * kCount + i] = values[i];
  }
  __syncthreads();
  sums += warp / warps * warps * kCount;
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = A(0);
  for (int w = 0; w < warps; ++w) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += sums[w * kCount + i];
  }
}

}  // namespace ghostgrad::cuda
