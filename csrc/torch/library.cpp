// Every op of ghostgrad, one schema each. Implementations stand in <op>_cpu.cpp and <op>_cuda.cpp, fake kernels and
// autograd in python/ghostgrad/ops.py, those of noise in noise.py.
//
// B samples, T positions, p in-features, d out-features; squared norms come in the accumulation dtype: float64 for
// float64, float32 for the rest.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ghostgrad, m) {
  // a (B, T, p), b (B, T, d) -> (B,)                            ||b_i^T a_i||^2, tile by tile
  m.def("outer_sqnorm(Tensor a, Tensor b) -> Tensor");
  // a (B, T, p), b (B, T, d) -> (B,)                            sum_{s,t} <a_is, a_it> <b_is, b_it>
  m.def("gram_sqnorm(Tensor a, Tensor b) -> Tensor");
  // a (B, T, p), b (B, T, d), weights (B,) -> (d, p), (B,)      sum_i c_i b_i^T a_i and ||b_i^T a_i||^2
  m.def("wgrad_sqnorm(Tensor a, Tensor b, Tensor? weights=None) -> (Tensor, Tensor)");
  // a (B, T, p), b (B, T, d) -> (d, p), (d, p), (B,)            sum_i b_i^T a_i, sum_i (b_i^T a_i)^2 by element, norms
  m.def("wgrad_moments(Tensor a, Tensor b) -> (Tensor, Tensor, Tensor)");
  // x (B, ...) -> (B,)                                          sum_j x_ij^2
  m.def("row_sqnorm(Tensor x) -> Tensor");
  // index (B, T), b (B, T, d) -> (B,)                           sum_{v >= 0} ||sum_{t: index[i, t] = v} b_it||^2
  m.def("embedding_sqnorm(Tensor index, Tensor b) -> Tensor");
  // b, x (B, T, d, S), mean, rstd (B, T, G)                     with g_i = sum_{t,s} b_i (x_i - mean) rstd and
  //   -> (d,), (B,), (d,), (B,)                                 h_i = sum_{t,s} b_i: sum_i g_i, ||g_i||^2, the same of
  //   h
  m.def(
      "affine_sqnorm(Tensor b, Tensor? x=None, Tensor? mean=None, Tensor? rstd=None, bool total=True) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  // b, x, mean, rstd as above, weight (d,)                      all that the backward of y = weight (x - mean) rstd +
  //   -> (B, T, d, S), (d,), (B,), (d,), (B,)                   shift gives, mean and rstd being those of x: the
  //   gradient of x, and the above
  m.def(
      "norm_affine(Tensor b, Tensor x, Tensor mean, Tensor rstd, Tensor? weight=None) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  // x (B, R, c, *size), b (B, R, d, *out) -> (B,)               squared norms of a convolution's weight (d, c / groups,
  // *kernel), from R runs of it for each sample
  m.def(
      "conv_sqnorm(Tensor x, Tensor b, int[] kernel, int[] stride, int[] padding, int[] dilation, "
      "int groups) -> Tensor");
  // x, b -> (d, c / groups, *kernel), (B,)                      the weight's gradient and these norms
  m.def(
      "conv_wgrad_sqnorm(Tensor x, Tensor b, int[] kernel, int[] stride, int[] padding, int[] dilation, "
      "int groups) -> (Tensor, Tensor)");

  // Planned: one of the above, or a plain matrix product and one of the above, whichever core/plan.h expects to be
  // fastest. a (B, T, p), b (B, T, d) -> (B,)
  m.def("sqnorm(Tensor a, Tensor b) -> Tensor");
  // a (B, T, p), b (B, T, d) -> (d, p), (B,)
  m.def("wgrad_and_sqnorm(Tensor a, Tensor b) -> (Tensor, Tensor)");
  // x, b -> (d, c / groups, *kernel), (B,)
  m.def(
      "conv_wgrad_and_sqnorm(Tensor x, Tensor b, int[] kernel, int[] stride, int[] padding, int[] dilation, "
      "int groups) -> (Tensor, Tensor)");

  // Noise with an address (Note [The address of noise] in csrc/core/noise.h). Tensor i is the whole of parameter i, or
  // the part of a parameter that blocks tells by four numbers: the parameter's number, and offset, run and pitch, by
  // which its element e has the index offset + e div run * pitch + e mod run in the full parameter.
  //
  // params                                                      w <- w + sigma * xi
  m.def(
      "perturb_(Tensor(a!)[] params, int seed, float sigma, str distribution=\"rademacher\", int[]? blocks=None) -> "
      "()");
  // plus, minus -> (P,) float64                                 sum xi (plus - minus) / (2 sigma) of each tensor
  m.def(
      "probe_dot(Tensor[] plus, Tensor[]? minus, int seed, float sigma, str distribution=\"rademacher\", "
      "int[]? blocks=None) -> Tensor");
  // plus, zero, minus (B,) -> (B,) float64                      (plus + minus - 2 zero) / sigma^2
  m.def("second_difference(Tensor plus, Tensor zero, Tensor minus, float sigma) -> Tensor");
  // params, grads, centre (or none), momenta (or none)          g = mix centre + (1 - mix) / passes grads, and the step
  //                                                             of SGD with it
  m.def(
      "nso_step_(Tensor(a!)[] params, Tensor[] grads, Tensor[] centre, Tensor(b!)[] momenta, float lr, float mix, "
      "int passes, float momentum=0, float dampening=0, float weight_decay=0, bool nesterov=False, bool first=False) "
      "-> ()");
}
