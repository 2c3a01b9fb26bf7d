// The arithmetic of nso_step_, on one element and on vectors alike.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace ghostgrad::core {

// In the order of torch.optim.SGD, a product and the sum that it is added to fused wherever PyTorch fuses them.
struct NsoStep {
  double lr;
  double mix;      // lambda, the weight of the centre's gradient
  int64_t passes;  // that grads are the sum of
  double momentum, dampening, weight_decay;
  bool nesterov;
  bool first;  // the momenta hold nothing yet
};

// The factors in the type that is computed in, as PyTorch converts them.
template <class A>
struct NsoFactors {
  A grads, centre, weight_decay, momentum, undamped, minus_lr;
  bool nesterov, first;

  GHOSTGRAD_HD explicit NsoFactors(const NsoStep& step)
      : grads(static_cast<A>((1.0 - step.mix) / static_cast<double>(step.passes))),
        centre(static_cast<A>(step.mix)),
        weight_decay(static_cast<A>(step.weight_decay)),
        momentum(static_cast<A>(step.momentum)),
        undamped(static_cast<A>(1.0 - step.dampening)),
        minus_lr(static_cast<A>(-step.lr)),
        nesterov(step.nesterov),
        first(step.first) {}
};

// M is the arithmetic: M::fused(x, a, y) is x a + y and M::scaled(x, a) is x a; F is the type of the values, A of the
// factors.
template <class M, class F, class A>
GHOSTGRAD_HD void nso_update(const NsoFactors<A>& factors, bool has_centre, bool has_momentum, F grads, F centre, F& w,
                             F& momentum) {
  F g = M::scaled(grads, factors.grads);
  if (has_centre) g = M::fused(centre, factors.centre, g);
  if (factors.weight_decay != A(0)) g = M::fused(w, factors.weight_decay, g);
  if (has_momentum) {
    momentum = factors.first ? g : M::fused(g, factors.undamped, M::scaled(momentum, factors.momentum));
    g = factors.nesterov ? M::fused(momentum, factors.momentum, g) : momentum;
  }
  w = M::fused(g, factors.minus_lr, w);
}

// What a tensor brings to the step: its elements, all in the same order.
struct NsoTensor {
  void* w;
  const void* grads;   // sum of the gradients of all perturbed passes
  const void* centre;  // gradient at w, or null
  void* momentum;      // or null
};

}  // namespace ghostgrad::core
