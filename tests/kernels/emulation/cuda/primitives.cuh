// csrc/cuda/primitives.cuh for the CPU: the same declarations over the emulation. What they mean is said there.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"

namespace ghostgrad::cuda {

// --- launches ---

struct Launch {
  int blocks;
  int threads;
  int shared_bytes = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& shape, cudaStream_t, const Arguments&... arguments) {
  emulation::run_grid(shape.blocks, shape.threads, shape.shared_bytes, kernel, arguments...);
  return cudaSuccess;
}

inline unsigned char* dynamic_shared() { return emulation::dynamic_shared.data; }

// --- asynchronous copies, sm_80 ---

namespace emulated {

// Demands an aligned place in shared memory.
inline void check_shared(const char* name, const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) emulation::fail("%s: misaligned in shared memory", name);
  if (!emulation::is_shared(address, bytes)) emulation::fail("%s: not in shared memory", name);
}

inline void perform(const emulation::Copy& copy) {
  auto* to = static_cast<unsigned char*>(copy.shared);
  if (copy.bytes > 0) std::memcpy(to, copy.global, static_cast<size_t>(copy.bytes));
  std::memset(to + copy.bytes, 0, static_cast<size_t>(copy.room - copy.bytes));
}

// Whether what may happen at once or later happens at once.
inline bool early() {
  return emulation::order == emulation::Order::kBackwards ||
         (emulation::order == emulation::Order::kShuffled && emulation::chance(2) == 0);
}

}  // namespace emulated

// It lands at once, or when its thread waits for it, or, in shuffled order, now this and now that.
template <int kBytes>
inline void copy_async(void* shared, const void* global, int bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async can copy");
  emulated::check_shared("copy_async", shared, kBytes);
  if (bytes < 0 || bytes > kBytes) emulation::fail("copy_async of %d bytes of %d", bytes, kBytes);
  if (bytes > 0 && reinterpret_cast<uintptr_t>(global) % kBytes != 0) emulation::fail("copy_async: misaligned source");
  emulation::Thread& thread = emulation::threads[static_cast<size_t>(emulation::current)];
  const emulation::Copy copy{shared, global, bytes, kBytes, thread.groups};
  if (emulated::early()) {
    emulated::perform(copy);
  } else {
    thread.copies.push_back(copy);
  }
}
inline void commit_copies() { ++emulation::threads[static_cast<size_t>(emulation::current)].groups; }
template <int kPending>
inline void wait_for_copies() {
  emulation::Thread& thread = emulation::threads[static_cast<size_t>(emulation::current)];
  size_t done = 0;
  while (done < thread.copies.size() && thread.copies[done].group < thread.groups - kPending) {
    emulated::perform(thread.copies[done++]);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

// --- matrix fragments and tensor cores, sm_80 ---

namespace emulated {

template <bool kTransposed>
void load_matrices(const char* name, uint32_t (&fragment)[4], const void* row) {
  check_shared(name, row, 16);
  struct Operands {
    uint32_t* fragment;
    const void* row;
  } mine{fragment, row};
  emulation::together<emulation::kLanes>(name, mine, [](Operands** lanes) {
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], lanes[8 * i + r]->row, 16);
      for (int lane = 0; lane < emulation::kLanes; ++lane) {
        const int g = lane / 4, q = lane % 4;
        const uint32_t low = kTransposed ? matrix[2 * q][g] : matrix[g][2 * q];
        const uint32_t high = kTransposed ? matrix[2 * q + 1][g] : matrix[g][2 * q + 1];
        lanes[lane]->fragment[i] = low | high << 16;
      }
    }
  });
}

}  // namespace emulated

inline void load_matrices(uint32_t (&fragment)[4], const void* row) {
  emulated::load_matrices<false>("load_matrices", fragment, row);
}
inline void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
  emulated::load_matrices<true>("load_matrices_transposed", fragment, row);
}

struct TF32 {};

inline uint32_t to_tf32(float value) {
  const uint32_t bits = core::bits_from_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;  // NaN
  if ((bits & 0x7fffffffu) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

namespace emulated {

// Element e of those in a register.
template <class S>
float element(uint32_t bits, int e) {
  return core::to_accumulation(S{static_cast<uint16_t>(bits >> 16 * e)});
}
template <>
inline float element<TF32>(uint32_t bits, int) {
  return core::float_from_bits(bits & ~0x1fffu);  // what the tensor cores do not read
}

template <class S>
constexpr const char* kMultiplyAdd = "multiply_add<TF32>";
template <>
inline constexpr const char* kMultiplyAdd<core::BFloat16> = "multiply_add<BFloat16>";
template <>
inline constexpr const char* kMultiplyAdd<core::Float16> = "multiply_add<Float16>";

}  // namespace emulated

// Exact products, added one after the other in float32.
template <class S>
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  emulation::together<emulation::kLanes>(emulated::kMultiplyAdd<S>, mine, [](Operands** lanes) {
    constexpr int kElements = std::is_same_v<S, TF32> ? 1 : 2, kDepth = 8 * kElements;
    float a[16][kDepth], b[kDepth][8], d[16][8];
    for (int lane = 0; lane < emulation::kLanes; ++lane) {
      const Operands& operands = *lanes[lane];
      const int g = lane / 4, q = lane % 4;
      for (int i = 0; i < 4; ++i) {
        for (int e = 0; e < kElements; ++e) {
          a[g + 8 * (i % 2)][kElements * q + e + kDepth / 2 * (i / 2)] = emulated::element<S>(operands.a[i], e);
        }
        d[g + 8 * (i / 2)][2 * q + i % 2] = operands.d[i];
      }
      for (int i = 0; i < 2; ++i) {
        for (int e = 0; e < kElements; ++e) {
          b[kElements * q + e + kDepth / 2 * i][g] = emulated::element<S>(operands.b[i], e);
        }
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < kDepth; ++k) {
        for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
      }
    }
    for (int lane = 0; lane < emulation::kLanes; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = d[g + 8 * (i / 2)][2 * q + i % 2];
    }
  });
}

}  // namespace ghostgrad::cuda
