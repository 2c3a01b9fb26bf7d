// What Hopper adds to primitives.cuh: bulk copies, barriers that count bytes, and products of warp groups. They exist
// on sm_90a and on no other architecture, where they are traps: launchers ask has_warpgroups() first.
#pragma once

#include <cuda.h>

#include "cuda/primitives.cuh"

namespace ghostgrad::cuda {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define GHOSTGRAD_SM90A(...) asm volatile(__VA_ARGS__)
#else
#define GHOSTGRAD_SM90A(...) __trap()
#endif

// Whether the current device runs the code above: Hopper, and only Hopper.
inline bool has_warpgroups() {
#ifdef GHOSTGRAD_HAS_SM90A  // it was compiled for it
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
#else
  return false;
#endif
}

inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// What the bulk copy engine knows of an array (matrices, rows, columns) of 16-bit elements. A kernel takes it as a
// `const __grid_constant__` parameter.
using TensorMap = CUtensorMap;

// Elements of a column lie side by side; the strides of rows and matrices are in elements. Boxes of 64 columns and
// `box_rows` rows of one matrix will be copied. False if the engine cannot take this array: then nothing may be copied.
inline bool make_tensor_map(TensorMap& map, core::DType dtype, const void* data, const int64_t (&sizes)[3],
                            const int64_t (&strides)[2], int box_rows) {
  for (int64_t stride : strides) {
    if (stride <= 0 || stride % 8 != 0) return false;
  }
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
  static const auto encode = [] {  // a function of the driver, which is not linked
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    const bool there = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(there ? function : nullptr);
  }();
  if (encode == nullptr) return false;
  const cuuint64_t extent[3] = {static_cast<cuuint64_t>(sizes[2]), static_cast<cuuint64_t>(sizes[1]),
                                static_cast<cuuint64_t>(sizes[0])};
  const cuuint64_t bytes[2] = {static_cast<cuuint64_t>(strides[1]) * 2, static_cast<cuuint64_t>(strides[0]) * 2};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), 1}, steps[3] = {1, 1, 1};
  return encode(&map,
                dtype == core::DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
                const_cast<void*>(data), extent, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// A barrier in shared memory, whose phase ends when as many threads have arrived as it was told to expect, and all
// bytes have. Phases are counted from 0; whoever waits for one says whether its number is odd.
struct alignas(8) Barrier {
  uint64_t state;
};

__device__ __forceinline__ void init_barrier(Barrier& barrier, int arrivals) {
  GHOSTGRAD_SM90A("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// After all init_barrier, by the thread that called them; a __syncthreads has to follow.
__device__ __forceinline__ void publish_barriers() {
  GHOSTGRAD_SM90A("fence.mbarrier_init.release.cluster;" :: : "memory");
}
__device__ __forceinline__ void arrive(Barrier& barrier) {
  GHOSTGRAD_SM90A("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives, and has the phase wait for that many bytes of copies, too.
__device__ __forceinline__ void arrive_and_expect(Barrier& barrier, int bytes) {
  GHOSTGRAD_SM90A("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
                  "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait_for_phase(Barrier& barrier, bool odd) {
  GHOSTGRAD_SM90A(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra retry;\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(static_cast<uint32_t>(odd)) : "memory");
}

// Starts the copy of the box whose first element is (matrix, row, column) to shared memory: a row takes 128 bytes, and
// its eight chunks of 16 bytes are swizzled, chunk c of row r lying at c ^ (r % 8). What is outside of the array
// becomes zero. The barrier is told of all bytes of the box when they have arrived. `shared` is aligned to 1024 bytes.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, int matrix, int row, int column,
                                         Barrier& barrier) {
  GHOSTGRAD_SM90A(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(matrix), "r"(shared_address(&barrier)) : "memory");
}

// Gives registers back to the multiprocessor, or takes some: all warps of a warp group, to kCount a thread.
template <int kCount>
__device__ __forceinline__ void give_registers_back() {
  GHOSTGRAD_SM90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  GHOSTGRAD_SM90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// The four warps of a warp group call these together. d (64 x 8 N) += a^T b for a (16 x 64) and b (16 x 8 N) in shared
// memory as copy_box leaves them: 64 columns in a box, boxes of further columns `box_bytes` apart. Sums of warp w, in
// its 16 rows from 16 w on, as in the fragments above:
//
//   d[4 n], d[4 n + 1]  row lane / 4, columns 8 n + 2 (lane % 4) and the next      d[4 n + 2], d[4 n + 3]  8 rows below
//
// Between begin_products() and commit_products() products are issued; their sums are there, and shared memory may be
// overwritten, after wait_for_products.

// What tells the tensor cores where a matrix is: its address, and how far apart 64 columns and 8 rows are.
__device__ __forceinline__ uint64_t box_descriptor(const void* shared, int box_bytes) {
  return static_cast<uint64_t>((shared_address(shared) & 0x3ffffu) >> 4) | static_cast<uint64_t>(box_bytes >> 4) << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
__device__ __forceinline__ void begin_products() { GHOSTGRAD_SM90A("wgmma.fence.sync.aligned;" :: : "memory"); }
__device__ __forceinline__ void commit_products() { GHOSTGRAD_SM90A("wgmma.commit_group.sync.aligned;" :: : "memory"); }

// d = a^T b, or d += a^T b if `accumulate`, for operands of type S.
template <class S, int kSums>
__device__ __forceinline__ void multiply_boxes(float (&d)[kSums], const void* a, const void* b, int box_bytes,
                                               bool accumulate);
// Waits until all but the latest kPending groups of products are done.
template <int kPending, int kSums>
__device__ __forceinline__ void wait_for_products(float (&d)[kSums]);

// A product names each of its registers: lists of 32 of them, and of the places of the sums in them.
// clang-format off
#define GHOSTGRAD_NAMES_0 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GHOSTGRAD_NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GHOSTGRAD_NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define GHOSTGRAD_NAMES_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define GHOSTGRAD_4(d, i) "+f"((d)[i]), "+f"((d)[i + 1]), "+f"((d)[i + 2]), "+f"((d)[i + 3])
#define GHOSTGRAD_32(d, i)                                                                        \
  GHOSTGRAD_4(d, i), GHOSTGRAD_4(d, i + 4), GHOSTGRAD_4(d, i + 8), GHOSTGRAD_4(d, i + 12),        \
  GHOSTGRAD_4(d, i + 16), GHOSTGRAD_4(d, i + 20), GHOSTGRAD_4(d, i + 24), GHOSTGRAD_4(d, i + 28)
#define GHOSTGRAD_SUMS_64(d) GHOSTGRAD_32(d, 0), GHOSTGRAD_32(d, 32)
#define GHOSTGRAD_SUMS_96(d) GHOSTGRAD_SUMS_64(d), GHOSTGRAD_32(d, 64)
#define GHOSTGRAD_SUMS_128(d) GHOSTGRAD_SUMS_96(d), GHOSTGRAD_32(d, 96)
#define GHOSTGRAD_NAMES_OF_64 GHOSTGRAD_NAMES_0 GHOSTGRAD_NAMES_32
#define GHOSTGRAD_NAMES_OF_96 GHOSTGRAD_NAMES_OF_64 GHOSTGRAD_NAMES_64
#define GHOSTGRAD_NAMES_OF_128 GHOSTGRAD_NAMES_OF_96 GHOSTGRAD_NAMES_96

#define GHOSTGRAD_PRODUCT(S, TYPE, SUMS, COLUMNS, A, B, ACCUMULATE)                                                   \
  template <>                                                                                                         \
  __device__ __forceinline__ void multiply_boxes<S, SUMS>(float (&d)[SUMS], const void* a, const void* b,             \
                                                          int box_bytes, bool accumulate) {                           \
    GHOSTGRAD_SM90A("{\n"                                                                                             \
                    ".reg .pred accumulate;\n"                                                                        \
                    "setp.ne.b32 accumulate, %" ACCUMULATE ", 0;\n"                                                   \
                    "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE                              \
                    " {" GHOSTGRAD_NAMES_OF_##SUMS "}, %" A ", %" B ", accumulate, 1, 1, 1, 1;\n"                     \
                    "}\n"                                                                                             \
                    : GHOSTGRAD_SUMS_##SUMS(d)                                                                        \
                    : "l"(box_descriptor(a, box_bytes)), "l"(box_descriptor(b, box_bytes)),                           \
                      "r"(static_cast<int>(accumulate)));                                                             \
  }
#define GHOSTGRAD_PRODUCTS(SUMS, COLUMNS, A, B, ACCUMULATE)                                                           \
  GHOSTGRAD_PRODUCT(core::BFloat16, "bf16", SUMS, COLUMNS, A, B, ACCUMULATE)                                          \
  GHOSTGRAD_PRODUCT(core::Float16, "f16", SUMS, COLUMNS, A, B, ACCUMULATE)                                            \
  template <>                                                                                                         \
  __device__ __forceinline__ void wait_for_products<0, SUMS>(float (&d)[SUMS]) {                                      \
    GHOSTGRAD_SM90A("wgmma.wait_group.sync.aligned 0;" : GHOSTGRAD_SUMS_##SUMS(d)::"memory");                         \
  }                                                                                                                   \
  template <>                                                                                                         \
  __device__ __forceinline__ void wait_for_products<1, SUMS>(float (&d)[SUMS]) {                                      \
    GHOSTGRAD_SM90A("wgmma.wait_group.sync.aligned 1;" : GHOSTGRAD_SUMS_##SUMS(d)::"memory");                         \
  }
GHOSTGRAD_PRODUCTS(64, "128", "64", "65", "66")
GHOSTGRAD_PRODUCTS(96, "192", "96", "97", "98")
GHOSTGRAD_PRODUCTS(128, "256", "128", "129", "130")
// clang-format on
#undef GHOSTGRAD_SM90A

}  // namespace ghostgrad::cuda
