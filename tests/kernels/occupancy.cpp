// What launchers ask for, and how many warps a multiprocessor then holds, found without a GPU.
//
//   occupancy launches    every launcher at several sizes on a pretended device of capability 8.0 and then 9.0, one
//   line per
//                         kernel that it starts: capability, mangled name, threads of a block, bytes of dynamic shared
//                         memory
//   occupancy kernels     the mangled names of all kernels
//   occupancy warps       reads lines "capability threads registers static_bytes dynamic_bytes", writes the active
//   warps of
//                         a multiprocessor for each
//
// The linker sends the calls below to us (-Wl,--wrap): nothing is launched, and pointers are never followed.
#include <cuda.h>
#include <cuda_occupancy.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda/affine_sqnorm.h"
#include "cuda/conv_sqnorm.h"
#include "cuda/conv_wgrad_sqnorm.h"
#include "cuda/embedding_sqnorm.h"
#include "cuda/gram_sqnorm.h"
#include "cuda/norm_affine.h"
#include "cuda/nso_step.h"
#include "cuda/outer_sqnorm.h"
#include "cuda/perturb.h"
#include "cuda/probe_dot.h"
#include "cuda/row_sqnorm.h"
#include "cuda/second_difference.h"
#include "cuda/wgrad_moments.h"
#include "cuda/wgrad_sqnorm.h"

using namespace ghostgrad;

static int capability = 80;  // of the device that we pretend to be

static std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;  // filled before main
  return names;
}

extern "C" {

void __real___cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*);
void __wrap___cudaRegisterFunction(void** handle, const char* host, char* device, const char* name, int limit,
                                   uint3* thread, uint3* block, dim3* threads, dim3* blocks, int* warp) {
  kernels()[host] = name;
  __real___cudaRegisterFunction(handle, host, device, name, limit, thread, block, threads, blocks, warp);
}

cudaError_t __wrap_cudaLaunchKernel(const void* kernel, dim3, dim3 threads, void**, size_t shared, cudaStream_t) {
  std::printf("%d %s %u %zu\n", capability, kernels()[kernel].c_str(), threads.x, shared);
  return cudaSuccess;
}

cudaError_t __wrap_cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t __wrap_cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t __wrap_cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? capability % 10
                                                            : 132;  // multiprocessors
  return cudaSuccess;
}

static CUresult encode_nothing(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                               const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                               CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;
}

cudaError_t __wrap_cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned int, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&encode_nothing);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"

static void products(core::DType dtype, bool tf32, int64_t B, int64_t T, int64_t p, int64_t d, void* memory) {
  core::Operands o{memory, memory, dtype, B, T, p, d, T * p, p, T * d, d};
  o.tf32 = tf32;
  cuda::launch_outer_sqnorm(o, memory, memory, nullptr);
  cuda::launch_gram_sqnorm(o, memory, memory, nullptr);
  cuda::launch_wgrad_sqnorm(o, nullptr, memory, memory, memory, nullptr);
  cuda::launch_wgrad_moments(o, memory, memory, memory, memory, nullptr);
}

static void rows(core::DType dtype, int64_t B, int64_t length, void* memory) {
  cuda::launch_row_sqnorm(core::Rows{memory, dtype, B, length, length}, memory, memory, nullptr);
}

static void picks(core::DType dtype, int64_t B, int64_t T, int64_t d, void* memory) {
  cuda::launch_embedding_sqnorm(core::Picks{memory, true, memory, dtype, B, T, d, T, 1, T * d, d}, memory, memory,
                                nullptr);
}

// `pad`: elements between rows; with one, nothing is aligned.
static void affine(core::DType dtype, int64_t B, int64_t T, int64_t d, int64_t after, int64_t groups, int64_t pad,
                   void* memory) {
  core::Normalisation n{};
  core::Affine& o = n.affine;
  o.b = o.x = o.mean = o.rstd = memory;
  o.scaled = true;
  o.dtype = dtype;
  o.batch = B;
  o.before = T;
  o.channels = d;
  o.after = after;
  o.groups = groups;
  o.b_batch_stride = o.x_batch_stride = n.batch_stride = T * (d * after + pad);
  o.b_before_stride = o.x_before_stride = n.before_stride = d * after + pad;
  o.b_channel_stride = o.x_channel_stride = after;
  o.mean_batch_stride = o.rstd_batch_stride = T * groups;
  o.mean_before_stride = o.rstd_before_stride = groups;
  o.mean_group_stride = o.rstd_group_stride = 1;
  n.weight = n.gradient = memory;
  const core::AffineResults results{memory, memory, memory, memory};
  cuda::launch_affine_sqnorm(o, results, memory, nullptr);
  cuda::launch_norm_affine(n, results, memory, nullptr);
  o.scaled = false;
  cuda::launch_affine_sqnorm(o, results, memory, nullptr);
}

static void convolution(core::DType dtype, bool tf32, int64_t B, int64_t T, int64_t d, int64_t groups, void* memory) {
  core::Convolution c{memory,    memory,    dtype,     B,         1,         d,         d,  groups,
                      {1, T, T}, {1, T, T}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {}, {}};
  const int64_t strides[6] = {d * T * T, d * T * T, T * T, T * T, T, 1};
  std::memcpy(c.x_strides, strides, sizeof(strides));
  std::memcpy(c.b_strides, strides, sizeof(strides));
  c.tf32 = tf32;
  cuda::launch_conv_sqnorm(c, memory, memory, nullptr);
  cuda::launch_conv_wgrad_sqnorm(c, memory, memory, memory, nullptr);
}

static void noise(core::DType dtype, size_t tensors, void* memory) {
  const int64_t count = static_cast<int64_t>(tensors), elements = 1 << 20;
  const std::vector<core::Section> sections(tensors, core::Section{elements, 0, 0, 0, elements, elements, 0});
  const std::vector<void*> pointers(tensors, memory);
  const std::vector<core::NsoTensor> entries(tensors, core::NsoTensor{memory, memory, memory, memory});
  const core::Noise source{1, core::Distribution::kNormal};
  cuda::launch_perturb(dtype, sections.data(), pointers.data(), count, source, 0.1, nullptr);
  cuda::launch_probe_dot(dtype, sections.data(), pointers.data(), pointers.data(), count, source, 0.1,
                         static_cast<double*>(memory), memory, nullptr);
  cuda::launch_nso_step(dtype, sections.data(), entries.data(), count,
                        core::NsoStep{0.1, 0.5, 2, 0.9, 0.0, 0.1, false, false}, nullptr);
  cuda::launch_second_difference(dtype, memory, memory, memory, count, 0.1, static_cast<double*>(memory), nullptr);
}

static void launches() {
  void* memory = reinterpret_cast<void*>(uintptr_t{1} << 30);
  for (int device : {80, 90}) {
    capability = device;
    for (core::DType dtype :
         {core::DType::kFloat32, core::DType::kFloat64, core::DType::kBFloat16, core::DType::kFloat16}) {
      for (bool tf32 : {false, true}) {
        if (tf32 && dtype != core::DType::kFloat32) continue;
        products(dtype, tf32, 4, 512, 4096, 4096, memory);
        products(dtype, tf32, 512, 64, 128, 64, memory);  // a small matrix: several runs of samples
        products(dtype, tf32, 8, 16, 1024, 1024, memory);
        products(dtype, tf32, 4, 4096, 256, 256, memory);
        products(dtype, tf32, 2, 5, 33, 35, memory);     // nothing is aligned
        products(dtype, tf32, 512, 64, 33, 35, memory);  // nor here, in several runs
        for (int64_t groups : {1, 2, 64}) {
          convolution(dtype, tf32, 4, 64, 1024, groups, memory);
          convolution(dtype, tf32, 512, 16, 64, groups, memory);
        }
        if (tf32) continue;
        for (size_t tensors : {1, 200}) noise(dtype, tensors, memory);
        for (int64_t length : {9, 1024, 4096, 1 << 14, 1 << 20}) rows(dtype, 512, length, memory);
        for (int64_t T : {64, 4096}) {
          for (int64_t d : {33, 1024}) picks(dtype, 4, T, d, memory);
        }
        for (int64_t groups : {1, 4}) {
          for (int64_t pad : {0, 1}) {
            for (int64_t d : {36, 1024, 2048, 4096, 8192, 1 << 18}) {
              affine(dtype, 4, 64, d, 1, groups, pad, memory);
              affine(dtype, 512, 1, d, 1, groups, pad, memory);
            }
          }
          for (int64_t after : {7, 64, 1024, 1 << 16}) affine(dtype, 32, 1, 64, after, groups, 0, memory);
        }
      }
    }
  }
}

static int warps() {
  int device, threads, registers;
  size_t constant, dynamic;
  while (std::scanf("%d %d %d %zu %zu", &device, &threads, &registers, &constant, &dynamic) == 5) {
    cudaOccDeviceProp properties{};
    properties.computeMajor = device / 10;
    properties.computeMinor = device % 10;
    properties.maxThreadsPerBlock = 1024;
    properties.maxThreadsPerMultiprocessor = 2048;
    properties.regsPerBlock = properties.regsPerMultiprocessor = 65536;
    properties.warpSize = 32;
    properties.sharedMemPerBlock = 48 * 1024;
    properties.sharedMemPerMultiprocessor = (device == 80 ? 164 : 228) * 1024;
    properties.sharedMemPerBlockOptin = (device == 80 ? 163 : 227) * 1024;
    properties.reservedSharedMemPerBlock = 1024;
    properties.numSms = device == 80 ? 108 : 132;
    cudaOccFuncAttributes attributes{};
    attributes.maxThreadsPerBlock = 1024;
    attributes.numRegs = registers;
    attributes.sharedSizeBytes = constant;
    attributes.partitionedGCConfig = PARTITIONED_GC_OFF;
    attributes.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    attributes.maxDynamicSharedSizeBytes = dynamic;
    cudaOccDeviceState state{};
    cudaOccResult result{};
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &attributes, &state, threads, dynamic) !=
        CUDA_OCC_SUCCESS) {
      return 1;
    }
    std::printf("%d\n", result.activeBlocksPerMultiprocessor * ((threads + 31) / 32));
  }
  return 0;
}

int main(int count, char** arguments) {
  if (count == 2 && std::strcmp(arguments[1], "launches") == 0) return launches(), 0;
  if (count == 2 && std::strcmp(arguments[1], "warps") == 0) return warps();
  if (count == 2 && std::strcmp(arguments[1], "kernels") == 0) {
    for (const auto& [pointer, name] : kernels()) std::printf("%s\n", name.c_str());
    return 0;
  }
  std::fprintf(stderr, "usage: occupancy launches | kernels | warps\n");
  return 2;
}
