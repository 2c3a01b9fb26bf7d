// Without a driver a launcher returns CUDA's error, and nothing else happens. With one, the Python tests run on the
// device.
#include <cstdio>
#include <vector>

#include "../core/expect.h"
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

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) {
    std::printf("there is a device: nothing to test here\n");
    return 0;
  }
  std::vector<double> memory(64);
  const core::Operands o{memory.data(), memory.data(), core::DType::kFloat32, 1, 2, 3, 4, 6, 3, 8, 4};
  const core::Rows rows{memory.data(), core::DType::kFloat32, 1, 2, 2};
  EXPECT(cuda::launch_outer_sqnorm(o, memory.data(), memory.data(), nullptr) != cudaSuccess);
  EXPECT(cuda::launch_gram_sqnorm(o, memory.data(), memory.data(), nullptr) != cudaSuccess);
  EXPECT(cuda::launch_wgrad_sqnorm(o, nullptr, memory.data(), memory.data(), memory.data(), nullptr) != cudaSuccess);
  EXPECT(cuda::launch_wgrad_moments(o, memory.data(), memory.data(), memory.data(), memory.data(), nullptr) !=
         cudaSuccess);
  const core::Picks picks{memory.data(), true, memory.data(), core::DType::kFloat32, 1, 2, 3, 2, 1, 6, 3};
  EXPECT(cuda::launch_embedding_sqnorm(picks, memory.data(), memory.data(), nullptr) != cudaSuccess);
  EXPECT(cuda::launch_row_sqnorm(rows, memory.data(), memory.data(), nullptr) != cudaSuccess);
  core::Affine affine{};
  affine.b = memory.data();
  affine.batch = affine.before = affine.after = affine.groups = 1;
  affine.channels = 2;
  const core::AffineResults results{nullptr, nullptr, memory.data(), memory.data()};
  EXPECT(cuda::launch_affine_sqnorm(affine, results, memory.data(), nullptr) != cudaSuccess);
  const core::Normalisation normalisation{affine, nullptr, memory.data(), 2, 2};
  EXPECT(cuda::launch_norm_affine(normalisation, results, memory.data(), nullptr) != cudaSuccess);
  core::Convolution c{memory.data(),
                      memory.data(),
                      core::DType::kFloat32,
                      1,
                      1,
                      1,
                      1,
                      1,
                      {1, 1, 3},
                      {1, 1, 2},
                      {1, 1, 2},
                      {1, 1, 1},
                      {0, 0, 0},
                      {1, 1, 1},
                      {3, 3, 3, 3, 3, 1},
                      {2, 2, 2, 2, 2, 1}};
  EXPECT(cuda::launch_conv_sqnorm(c, memory.data(), memory.data(), nullptr) != cudaSuccess);
  EXPECT(cuda::launch_conv_wgrad_sqnorm(c, memory.data(), memory.data(), memory.data(), nullptr) != cudaSuccess);
  const core::Section section{8, 0, 0, 0, 8, 8, 0};
  const core::Noise noise{1, core::Distribution::kNormal};
  void* const params[] = {memory.data()};
  const void* const grads[] = {memory.data()};
  const core::NsoTensor tensor{memory.data(), memory.data(), nullptr, nullptr};
  EXPECT(cuda::launch_perturb(core::DType::kFloat32, &section, params, 1, noise, 0.1, nullptr) != cudaSuccess);
  EXPECT(cuda::launch_probe_dot(core::DType::kFloat32, &section, grads, nullptr, 1, noise, 0.1, memory.data(),
                                memory.data(), nullptr) != cudaSuccess);
  EXPECT(cuda::launch_nso_step(core::DType::kFloat32, &section, &tensor, 1,
                               core::NsoStep{0.1, 0, 1, 0, 0, 0, false, false}, nullptr) != cudaSuccess);
  EXPECT(cuda::launch_second_difference(core::DType::kFloat32, memory.data(), memory.data(), memory.data(), 8, 0.1,
                                        memory.data(), nullptr) != cudaSuccess);
  return failures;
}
