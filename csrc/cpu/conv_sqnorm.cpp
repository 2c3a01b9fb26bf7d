// conv_sqnorm on the CPU: sqnorm[i] = ||G_i||^2 of a convolution's weight, in two forms.
//
// Outer: a unit of work is one tile of one sample, squared in registers and never written (conv_product.h).
//
// Gram: where positions are few and features many, sum_{s,t} <patch_s, patch_t> <b_s, b_t>. A unit is one sample, whose
// patches are formed, one group at a time. Memory beside the operands: that, per thread.
//
// Partials are float64, added pairwise in a fixed order.
#include "core/reduce.h"
#include "core/storage.h"
#include "cpu/conv_product.h"
#include "cpu/gram_product.h"
#include "cpu/isa.h"

namespace ghostgrad::cpu::GHOSTGRAD_ISA {
namespace {

template <class S>
void run_outer(const core::Convolution& o, void* sqnorm, ParallelFor parallel) {
  using A = core::accumulation_t<S>;
  if (o.elements() == 0 || o.batch * o.positions() == 0) {
    for (int64_t i = 0; i < o.batch; ++i) static_cast<A*>(sqnorm)[i] = A(0);
    return;
  }
  const typename ConvProduct<S>::Cut cut = ConvProduct<S>::cut(o);
  const int64_t tiles = cut.tiles();
  Scratch scratch(Scratch::room<double>(o.batch * tiles));
  double* partial = scratch.take<double>(o.batch * tiles);  // (B, tiles)
  auto body = [&](int64_t begin, int64_t end) {
    ConvProduct<S> product(o, cut, /*wgrad=*/false, /*samples=*/1);
    for (int64_t unit = begin; unit < end; ++unit) {
      product.select_tile(unit % tiles);
      partial[unit] = product.template add_sample<false>(unit / tiles);
    }
  };
  parallel(o.batch * tiles, product_operations(o), body);

  for (int64_t i = 0; i < o.batch; ++i) {
    static_cast<A*>(sqnorm)[i] = static_cast<A>(core::pairwise_sum(partial + i * tiles, tiles, 1));
  }
}

// The patches and output gradients of one sample and group as the operands of a product: both with positions first.
template <class S>
class Patches {
 public:
  using A = core::accumulation_t<S>;

  static int64_t box_extent(const core::Convolution& o, int i) {
    return (o.out[i] - 1) * o.stride[i] + (o.kernel[i] - 1) * o.dilation[i] + 1;
  }
  static int64_t box_elements(const core::Convolution& o) {
    return box_extent(o, 0) * box_extent(o, 1) * box_extent(o, 2) * o.group_channels();
  }
  static size_t room(const core::Convolution& o) {
    return Scratch::room<A>(box_elements(o)) + Scratch::room<A>(o.positions() * o.in_features()) +
           Scratch::room<A>(o.positions() * o.group_outputs());
  }

  explicit Patches(const core::Convolution& o) : o_(o), scratch_(room(o)) {
    box_ = scratch_.take<A>(box_elements(o));
    patches_ = scratch_.take<A>(o.positions() * o.in_features());
    gradients_ = scratch_.take<A>(o.positions() * o.group_outputs());
  }

  core::Operands form(int64_t sample, int64_t group) {
    const int64_t per_run = o_.out[0] * o_.out[1] * o_.out[2];
    for (int64_t run = 0; run < o_.runs; ++run) {
      fill_box(sample, run, group);
      form_patches(patches_ + run * per_run * o_.in_features());
      const S* b = static_cast<const S*>(o_.b) + sample * o_.b_strides[0] + run * o_.b_strides[1] +
                   group * o_.group_outputs() * o_.b_strides[2];
      A* to = gradients_ + run * per_run * o_.group_outputs();
      for (int64_t z = 0; z < o_.out[0]; ++z) {
        for (int64_t y = 0; y < o_.out[1]; ++y, to += o_.out[2] * o_.group_outputs()) {
          move(b + z * o_.b_strides[3] + y * o_.b_strides[4], o_.b_strides[5], o_.b_strides[2], o_.out[2],
               o_.group_outputs(), to, o_.group_outputs(), int64_t{1});
        }
      }
    }
    const core::DType dtype = sizeof(A) == 8 ? core::DType::kFloat64 : core::DType::kFloat32;
    return core::Operands{patches_,
                          gradients_,
                          dtype,
                          1,
                          o_.positions(),
                          o_.in_features(),
                          o_.group_outputs(),
                          0,
                          o_.in_features(),
                          0,
                          o_.group_outputs()};
  }

 private:
  // The padded image of a group with its channels last, (z, y, x, channel).
  void fill_box(int64_t sample, int64_t run, int64_t group) {
    for (int64_t i = 0; i < box_elements(o_); ++i) box_[i] = A(0);
    const int64_t* strides = o_.x_strides;
    const int64_t channels = o_.group_channels();
    const S* image =
        static_cast<const S*>(o_.x) + sample * strides[0] + run * strides[1] + group * channels * strides[2];
    int64_t end[3];  // in the image, of what the box sees
    for (int i = 0; i < 3; ++i) end[i] = core::minimum(o_.size[i], box_extent(o_, i) - o_.padding[i]);
    for (int64_t z = 0; z < end[0]; ++z) {
      for (int64_t y = 0; y < end[1]; ++y) {
        A* to =
            box_ + (((z + o_.padding[0]) * box_extent(o_, 1) + y + o_.padding[1]) * box_extent(o_, 2) + o_.padding[2]) *
                       channels;
        move(image + z * strides[3] + y * strides[4], strides[5], strides[2], end[2], channels, to, channels,
             int64_t{1});
      }
    }
  }

  // (positions, *kernel, channels): the order of features does not matter to inner products.
  void form_patches(A* to) const {
    const int64_t channels = o_.group_channels();
    for (int64_t z = 0; z < o_.out[0]; ++z) {
      for (int64_t y = 0; y < o_.out[1]; ++y) {
        for (int64_t x = 0; x < o_.out[2]; ++x) {
          for (int64_t kz = 0; kz < o_.kernel[0]; ++kz) {
            for (int64_t ky = 0; ky < o_.kernel[1]; ++ky) {
              for (int64_t kx = 0; kx < o_.kernel[2]; ++kx, to += channels) {
                const int64_t at_z = z * o_.stride[0] + kz * o_.dilation[0],
                              at_y = y * o_.stride[1] + ky * o_.dilation[1];
                const int64_t at_x = x * o_.stride[2] + kx * o_.dilation[2];
                const A* from = box_ + ((at_z * box_extent(o_, 1) + at_y) * box_extent(o_, 2) + at_x) * channels;
                for (int64_t c = 0; c < channels; ++c) to[c] = from[c];
              }
            }
          }
        }
      }
    }
  }

  const core::Convolution& o_;
  Scratch scratch_;
  A* box_;        // (*box, channels)
  A* patches_;    // (positions, in_features)
  A* gradients_;  // (positions, out_features)
};

template <class S>
void run_gram(const core::Convolution& o, void* sqnorm, ParallelFor parallel) {
  using A = core::accumulation_t<S>;
  if (o.elements() == 0 || o.batch * o.positions() == 0) {
    for (int64_t i = 0; i < o.batch; ++i) static_cast<A*>(sqnorm)[i] = A(0);
    return;
  }
  const int64_t pairs = strip_pairs(o.positions());
  auto body = [&](int64_t begin, int64_t end) {
    Patches<S> patches(o);
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0.0;
      for (int64_t group = 0; group < o.groups; ++group) {
        const core::Operands operands = patches.form(i, group);
        for (int64_t pair = 0; pair < pairs; ++pair) sum += strip_pair_sum<A>(operands, 0, pair);
      }
      static_cast<A*>(sqnorm)[i] = static_cast<A>(sum);
    }
  };
  const double T = static_cast<double>(o.positions()),
               features = static_cast<double>(o.in_features() + o.group_outputs());
  parallel(o.batch, static_cast<double>(o.batch * o.groups) * T * T * (features + 200), body);
}

}  // namespace

void conv_outer_sqnorm(const core::Convolution& convolution, void* sqnorm, ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(convolution.dtype, run_outer, convolution, sqnorm, parallel)
}

void conv_gram_sqnorm(const core::Convolution& convolution, void* sqnorm, ParallelFor parallel) {
  GHOSTGRAD_FOR_DTYPE(convolution.dtype, run_gram, convolution, sqnorm, parallel)
}

}  // namespace ghostgrad::cpu::GHOSTGRAD_ISA
