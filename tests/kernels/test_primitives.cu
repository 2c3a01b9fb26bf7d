// What csrc/cuda/primitives.cuh and hopper.cuh promise, checked wherever it runs: by g++ on a CPU with emulation/, by
// nvcc on a GPU. That both pass is what makes the emulation's word on the kernels worth something.
//
// Elements are small integers, so sums are exact in any order and results are compared for equality.
#include <cstdio>
#include <cstring>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "../core/expect.h"
#include "core/dtype.h"
#include "cuda/hopper.cuh"
#include "cuda/primitives.cuh"

using namespace ghostgrad;

namespace {

// Memory that host and device read and write.
template <class T>
struct Shared {
  T* data = nullptr;
  size_t count;
  explicit Shared(size_t count_) : count(count_) {
    if (cudaMallocManaged(reinterpret_cast<void**>(&data), count * sizeof(T)) != cudaSuccess) std::abort();
    std::memset(static_cast<void*>(data), 0xff, count * sizeof(T));
  }
  Shared(const Shared&) = delete;
  ~Shared() { cudaFree(data); }
  T& operator[](size_t i) { return data[i]; }
};

template <class S>
using stored_t = std::conditional_t<std::is_same_v<S, cuda::TF32>, float, S>;
template <class S>
constexpr int kElements = std::is_same_v<S, cuda::TF32> ? 1 : 2;  // of a register
template <class S>
constexpr int kDepth = 8 * kElements<S>;

template <class S>
stored_t<S> store(int value) {
  return core::from_accumulation<stored_t<S>>(static_cast<float>(value));
}

template <class S>
__device__ uint32_t pack(const stored_t<S>* at, int apart) {
  if constexpr (std::is_same_v<S, cuda::TF32>) {
    return core::bits_from_float(at[0]) | 0x1fffu;  // what tensor cores must not read
  } else {
    return static_cast<uint32_t>(at[0].bits) | static_cast<uint32_t>(at[apart].bits) << 16;
  }
}

// d (16, 8) += a (16, K) b (K, 8) by one warp, fragments put together as the header says.
template <class S>
__global__ void multiply_kernel(const stored_t<S>* a, const stored_t<S>* b, float* d) {
  constexpr int K = kDepth<S>, E = kElements<S>;
  const int g = static_cast<int>(threadIdx.x) / 4, q = static_cast<int>(threadIdx.x) % 4;
  uint32_t a_fragment[4], b_fragment[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) a_fragment[i] = pack<S>(a + (g + i % 2 * 8) * K + E * q + i / 2 * (K / 2), 1);
  for (int i = 0; i < 2; ++i) b_fragment[i] = pack<S>(b + (E * q + i * (K / 2)) * 8 + g, 8);
  for (int i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
  cuda::multiply_add<S>(sums, a_fragment, b_fragment);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sums[i];
}

template <class S>
void test_multiply_add() {
  constexpr int K = kDepth<S>;
  std::mt19937 generator(1);
  const auto draw = [&] { return static_cast<int>(generator() % 17) - 8; };
  Shared<stored_t<S>> a(16 * K), b(K * 8);
  Shared<float> d(16 * 8);
  std::vector<int> a_values(a.count), b_values(b.count), truth(d.count);
  for (size_t i = 0; i < a.count; ++i) a[i] = store<S>(a_values[i] = draw());
  for (size_t i = 0; i < b.count; ++i) b[i] = store<S>(b_values[i] = draw());
  for (size_t i = 0; i < d.count; ++i) d[i] = static_cast<float>(truth[i] = draw());
  for (size_t r = 0; r < 16; ++r) {
    for (size_t c = 0; c < 8; ++c) {
      for (size_t k = 0; k < K; ++k) truth[r * 8 + c] += a_values[r * K + k] * b_values[k * 8 + c];
    }
  }
  EXPECT(cuda::launch(multiply_kernel<S>, cuda::Launch{1, 32}, nullptr, a.data, b.data, d.data) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  for (size_t i = 0; i < d.count; ++i) {
    EXPECT(d[i] == static_cast<float>(truth[i]), "(%zu, %zu): %g, not %d", i / 8, i % 8, static_cast<double>(d[i]),
           truth[i]);
  }
}

// Four 8 x 8 matrices, side by side in rows of 32 elements, by load_matrices and its transposed twin.
__global__ void load_kernel(const uint16_t* matrices, uint32_t* plain, uint32_t* transposed) {
  __shared__ __align__(16) uint16_t stage[8][32];
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 8 * 32; i += 32) stage[i / 32][i % 32] = matrices[i];
  __syncthreads();
  uint32_t fragment[4];
  cuda::load_matrices(fragment, &stage[lane % 8][lane / 8 * 8]);
  for (int i = 0; i < 4; ++i) plain[lane * 4 + i] = fragment[i];
  cuda::load_matrices_transposed(fragment, &stage[lane % 8][lane / 8 * 8]);
  for (int i = 0; i < 4; ++i) transposed[lane * 4 + i] = fragment[i];
}

void test_load_matrices() {
  Shared<uint16_t> matrices(8 * 32);
  Shared<uint32_t> plain(32 * 4), transposed(32 * 4);
  for (size_t i = 0; i < matrices.count; ++i) matrices[i] = static_cast<uint16_t>(i);
  EXPECT(cuda::launch(load_kernel, cuda::Launch{1, 32}, nullptr, matrices.data, plain.data, transposed.data) ==
         cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  for (unsigned lane = 0; lane < 32; ++lane) {
    for (unsigned i = 0; i < 4; ++i) {
      const auto element = [&](unsigned row, unsigned column) { return row * 32 + i * 8 + column; };
      const unsigned g = lane / 4, q = 2 * (lane % 4);
      EXPECT(plain[lane * 4 + i] == (element(g, q) | element(g, q + 1) << 16), "lane %u, register %u", lane, i);
      EXPECT(transposed[lane * 4 + i] == (element(q, g) | element(q + 1, g) << 16), "lane %u, register %u", lane, i);
    }
  }
}

// Each thread copies kBytes, of which `bytes` are there, in each of four groups, and hands out what another has copied:
// all groups but the last, then the last.
constexpr int kGroups = 4;
template <int kBytes>
__global__ void copy_kernel(const unsigned char* from, int bytes, unsigned char* to) {
  unsigned char* stage = cuda::dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int group = 0; group < kGroups; ++group) {
    const int at = (group * threads + thread) * kBytes;
    cuda::copy_async<kBytes>(stage + at, bytes == 0 ? nullptr : from + at, bytes);
    cuda::commit_copies();
  }
  const auto hand_out = [&](int first, int last) {
    __syncthreads();
    for (int group = first; group < last; ++group) {
      const int at = (group * threads + threads - 1 - thread) * kBytes;
      for (int i = 0; i < kBytes; ++i) to[at + i] = stage[at + i];
    }
  };
  cuda::wait_for_copies<1>();
  hand_out(0, kGroups - 1);
  cuda::wait_for_copies<0>();
  hand_out(kGroups - 1, kGroups);
}

template <int kBytes>
void test_copy_async() {
  constexpr int kThreads = 64;
  for (int bytes : {kBytes, kBytes / 2, 1, 0}) {
    Shared<unsigned char> from(kGroups * kThreads * kBytes), to(from.count);
    for (size_t i = 0; i < from.count; ++i) from[i] = static_cast<unsigned char>(i * 7 + i / 256);
    EXPECT(cuda::launch(copy_kernel<kBytes>, cuda::Launch{1, kThreads, kGroups * kThreads * kBytes}, nullptr, from.data,
                        bytes, to.data) == cudaSuccess);
    EXPECT(cudaDeviceSynchronize() == cudaSuccess);
    for (size_t i = 0; i < to.count; ++i) {
      const unsigned char truth = i % kBytes < static_cast<size_t>(bytes) ? from[i] : 0;
      EXPECT(to[i] == truth, "byte %zu of copies of %d of %d bytes: %d, not %d", i, bytes, kBytes, to[i], truth);
    }
  }
}

__global__ void round_kernel(const float* from, uint32_t* to) { to[threadIdx.x] = cuda::to_tf32(from[threadIdx.x]); }

void test_to_tf32() {
  const float values[] = {0.0f,       -0.0f,         1.0f,          0x1.002p0f, 0x1.001p0f, -0x1.001p0f,
                          0x1.003p0f, 0x1.000ffep0f, 0x1.fffffep0f, INFINITY,   -INFINITY};
  const float rounded[] = {0.0f,       -0.0f,    1.0f, 0x1.004p0f, 0x1.0p0f, -0x1.0p0f,
                           0x1.004p0f, 0x1.0p0f, 2.0f, INFINITY,   -INFINITY};
  Shared<float> from(32);
  Shared<uint32_t> to(32);
  for (size_t i = 0; i < 32; ++i) from[i] = values[i % std::size(values)];
  EXPECT(cuda::launch(round_kernel, cuda::Launch{1, 32}, nullptr, from.data, to.data) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  for (size_t i = 0; i < std::size(values); ++i) {
    EXPECT((to[i] & ~0x1fffu) == core::bits_from_float(rounded[i]), "%a is %a", static_cast<double>(values[i]),
           static_cast<double>(core::float_from_bits(to[i])));
  }
}

// Hopper: d (64, kColumns) = a^T b for boxes of matrix 1 of two arrays, from (row, column) on and partly outside.
constexpr int kBox = 64, kRow = 3, kColumn = 5, kBoxBytes = kBox * kBox * 2;

template <class S, int kColumns>
__global__ void __launch_bounds__(128)
    box_kernel(const __grid_constant__ cuda::TensorMap a, const __grid_constant__ cuda::TensorMap b, float* d) {
  unsigned char* stage = cuda::dynamic_shared();
  __shared__ cuda::Barrier full;
  if (threadIdx.x == 0) {
    cuda::init_barrier(full, 1);
    cuda::publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    cuda::arrive_and_expect(full, (1 + kColumns / kBox) * kBoxBytes);
    cuda::copy_box(stage, a, 1, kRow, kColumn, full);
    for (int box = 0; box < kColumns / kBox; ++box) {
      cuda::copy_box(stage + (1 + box) * kBoxBytes, b, 1, kRow, kColumn + box * kBox, full);
    }
  }
  cuda::wait_for_phase(full, false);
  float sums[kColumns / 2];
  cuda::begin_products();
#pragma unroll
  for (int k = 0; k < kBox; k += 16) {
    cuda::multiply_boxes<S>(sums, stage + k * 128, stage + kBoxBytes + k * 128, kBoxBytes, k > 0);
  }
  cuda::commit_products();
  cuda::wait_for_products<0>(sums);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    d[(warp * 16 + lane / 4 + i % 4 / 2 * 8) * kColumns + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
}

template <class S, int kColumns>
void test_boxes() {
  constexpr int64_t kRows = 40, kWidth = kColumns, kStride = kWidth + 8;
  std::mt19937 generator(1);
  Shared<S> a(2 * kRows * kStride), b(a.count);
  Shared<float> d(kBox * kColumns);
  for (Shared<S>* x : {&a, &b}) {
    for (int64_t i = 0; i < 2 * kRows * kStride; ++i) {
      if (i % kStride < kWidth) (*x)[static_cast<size_t>(i)] = store<S>(static_cast<int>(generator() % 17) - 8);
    }
  }
  const auto value = [&](Shared<S>& x, int64_t row, int64_t column) {
    if (row >= kRows || column >= kWidth) return 0.0f;
    return core::to_accumulation(x[static_cast<size_t>((kRows + row) * kStride + column)]);
  };
  const core::DType dtype = std::is_same_v<S, core::BFloat16> ? core::DType::kBFloat16 : core::DType::kFloat16;
  cuda::TensorMap a_map, b_map;
  for (auto [map, x] : {std::pair{&a_map, &a}, std::pair{&b_map, &b}}) {
    EXPECT(cuda::make_tensor_map(*map, dtype, x->data, {2, kRows, kWidth}, {kRows * kStride, kStride}, kBox));
  }
  EXPECT(cuda::launch(box_kernel<S, kColumns>, cuda::Launch{1, 128, (1 + kColumns / kBox) * kBoxBytes}, nullptr, a_map,
                      b_map, d.data) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  for (int r = 0; r < kBox; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      float truth = 0;
      for (int k = 0; k < kBox; ++k) truth += value(a, kRow + k, kColumn + r) * value(b, kRow + k, kColumn + c);
      const float got = d[static_cast<size_t>(r * kColumns + c)];
      EXPECT(got == truth, "(%d, %d): %g, not %g", r, c, static_cast<double>(got), static_cast<double>(truth));
    }
  }
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no device: nothing to test here\n");
    return 0;
  }
  test_multiply_add<core::BFloat16>();
  test_multiply_add<core::Float16>();
  test_multiply_add<cuda::TF32>();
  test_load_matrices();
  test_copy_async<4>();
  test_copy_async<8>();
  test_copy_async<16>();
  test_to_tf32();
  if (cuda::has_warpgroups()) {
    test_boxes<core::BFloat16, 128>();
    test_boxes<core::BFloat16, 192>();
    test_boxes<core::Float16, 256>();
  }
  return failures != 0;
}
