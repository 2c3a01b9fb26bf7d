// The tiles of G_i = b_i^T a_i that blocks share out among themselves: what outer_sqnorm, wgrad_sqnorm and
// wgrad_moments have in common.
//
// The (d, p) matrix is cut into tiles and the batch into runs of samples; a block owns one tile for one run at a time.
// One run holds the whole batch unless the matrix has fewer tiles than a GPU wants blocks.
//
// A kernel says what happens at the start of such a unit, after each of its samples, when the tile of G_i is in the
// registers of the block's threads, and at its end. Fused and Matrix (product.cuh) multiply, and on Hopper
//
// - Warpgroups<S, columns>: warp-group products of half types, whose operands the bulk copy engine brings. Threads 0 to
//   255 are two warp groups that own 64 x columns each of a tile of 128 x columns; one thread of a third issues the
//   copies, kStages of kStep positions ahead, across samples and units.
#pragma once

#include <optional>

#include "cuda/hopper.cuh"
#include "cuda/product.cuh"

namespace ghostgrad::cuda {
namespace {

struct Tiling {
  int64_t tiles, column_tiles, run_length, runs;

  GHOSTGRAD_HD int64_t units() const { return tiles * runs; }
};

template <class Math>
Tiling tiling_of(const core::Operands& o) {
  const int64_t column_tiles = core::ceil_div(o.in_features, Math::kColumns);
  const int64_t tiles = core::ceil_div(o.out_features, Math::kRows) * column_tiles;
  const int64_t runs = core::sample_runs(o.batch, o.positions, tiles, kUnits);
  const int64_t run_length = core::maximum(1, core::ceil_div(o.batch, runs));
  return Tiling{tiles, column_tiles, run_length, core::maximum(1, core::ceil_div(o.batch, run_length))};
}

// One tile for one run of samples.
struct Unit {
  int64_t tile, run;
  int row, column, first, last;  // of the tile, and of the samples
};
template <class Math>
__device__ __forceinline__ Unit unit_at(const Tiling& tiling, int64_t batch, int64_t index) {
  const int64_t tile = index / tiling.runs, run = index % tiling.runs, first = run * tiling.run_length;
  return Unit{tile,
              run,
              static_cast<int>(tile / tiling.column_tiles) * Math::kRows,
              static_cast<int>(tile % tiling.column_tiles) * Math::kColumns,
              static_cast<int>(first),
              static_cast<int>(core::minimum(first + tiling.run_length, batch))};
}

// What a kernel gets of its operands. No inputs if this mathematics cannot take them.
template <class Math>
struct Inputs {
  core::Operands operands;

  static std::optional<Inputs> of(const core::Operands& o) { return Inputs{o}; }
};

// Calls begin(unit), finish(unit, sample, sums) for each of its samples, sums being this thread's part of the tile of
// G_i, and end(unit), for every unit of this block.
template <class Math, class Begin, class Finish, class End>
__device__ __forceinline__ void for_each_tile(const Inputs<Math>& inputs, const Tiling& tiling, const Begin& begin,
                                              const Finish& finish, const End& end) {
  using S = typename Math::Element;
  using Positions = Source<S, Adjacent::kOuter>;
  const core::Operands& o = inputs.operands;
  const int positions = static_cast<int>(o.positions);
  const int in_features = static_cast<int>(o.in_features), out_features = static_cast<int>(o.out_features);
  const S* a = static_cast<const S*>(o.a);
  const S* b = static_cast<const S*>(o.b);
  const bool a_vectors = aligned(a, (o.a_batch_stride | o.a_position_stride) * int64_t{sizeof(S)});
  const bool b_vectors = aligned(b, (o.b_batch_stride | o.b_position_stride) * int64_t{sizeof(S)});
  for (int64_t index = blockIdx.x; index < tiling.units(); index += gridDim.x) {
    const Unit unit = unit_at<Math>(tiling, o.batch, index);
    begin(unit);
    multiply<Math, Adjacent::kOuter>(
        unit.first, unit.last, [&](int) { return positions; },
        [&](int sample, int t, auto& stage) {
          Positions{b + sample * o.b_batch_stride, o.b_position_stride, positions, out_features, b_vectors}.stage(
              t, unit.row, stage.rows);
          Positions{a + sample * o.a_batch_stride, o.a_position_stride, positions, in_features, a_vectors}.stage(
              t, unit.column, stage.columns);
        },
        [&](int sample, const auto& sums) { finish(unit, sample, sums); });
    end(unit);
  }
}

// --- Hopper ---

template <class S, int kColumns_>
struct Warpgroups {
  using Element = S;
  using Sum = float;
  static constexpr int kRows = 128, kColumns = kColumns_, kStep = 64;
  static constexpr int kBox = 64;  // columns that are copied, and swizzled, together
  static constexpr int kSums = kColumns / 2;
  static constexpr int kBlockThreads = kThreads + 128, kBlocks = 1;
  static constexpr bool kCompensated = false;

  struct Stage {
    alignas(1024) S rows[kRows / kBox][kStep][kBox];
    alignas(1024) S columns[kColumns / kBox][kStep][kBox];
  };
  static constexpr int kStages = 208 * 1024 / int{sizeof(Stage)};
  struct Shared {
    Stage ring[kStages];
    Barrier full[kStages], empty[kStages];
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "what a block can have");

  __device__ static int row(int i) {
    return static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4 + i % 4 / 2 * 8;
  }
  __device__ static int column(int i) { return i / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2; }
};

template <class S, int kColumns>
struct Inputs<Warpgroups<S, kColumns>> {
  core::Operands operands;
  TensorMap a, b;

  static std::optional<Inputs> of(const core::Operands& o) {
    constexpr int kBoxRows = Warpgroups<S, kColumns>::kStep;
    Inputs inputs{o, {}, {}};
    const bool taken = has_warpgroups() && o.batch * o.positions > 0 &&
                       make_tensor_map(inputs.a, o.dtype, o.a, {o.batch, o.positions, o.in_features},
                                       {o.a_batch_stride, o.a_position_stride}, kBoxRows) &&
                       make_tensor_map(inputs.b, o.dtype, o.b, {o.batch, o.positions, o.out_features},
                                       {o.b_batch_stride, o.b_position_stride}, kBoxRows);
    return taken ? std::optional<Inputs>(inputs) : std::nullopt;
  }
};

// The place in the ring where the next step is, and whether its phase is odd.
template <class Math>
struct RingPlace {
  int slot = 0;
  bool odd = false;

  __device__ __forceinline__ void next() {
    slot = slot + 1 == Math::kStages ? 0 : slot + 1;
    odd ^= slot == 0;
  }
};

template <class S, int kColumns, class Begin, class Finish, class End>
__device__ __forceinline__ void for_each_tile(const Inputs<Warpgroups<S, kColumns>>& inputs, const Tiling& tiling,
                                              const Begin& begin, const Finish& finish, const End& end) {
  using Math = Warpgroups<S, kColumns>;
  auto& shared = *reinterpret_cast<typename Math::Shared*>(dynamic_shared());
  constexpr int kBoxBytes = Math::kStep * Math::kBox * int{sizeof(S)};
  const core::Operands& o = inputs.operands;
  const int positions = static_cast<int>(o.positions);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Math::kStages; ++i) {
      init_barrier(shared.full[i], 1);   // the one thread that copies, and all bytes
      init_barrier(shared.empty[i], 2);  // the two warp groups that have multiplied
    }
    publish_barriers();
  }
  __syncthreads();
  RingPlace<Math> place;
  if (threadIdx.x >= kThreads) {
    give_registers_back<40>();
    if (threadIdx.x != kThreads) return;
    for (int64_t index = blockIdx.x; index < tiling.units(); index += gridDim.x) {
      const Unit unit = unit_at<Math>(tiling, o.batch, index);
      for (int sample = unit.first; sample < unit.last; ++sample) {
        for (int t = 0; t < positions; t += Math::kStep, place.next()) {
          typename Math::Stage& stage = shared.ring[place.slot];
          Barrier& full = shared.full[place.slot];
          wait_for_phase(shared.empty[place.slot], !place.odd);  // in the first round nothing has to be waited for
          arrive_and_expect(full, int{sizeof(stage)});
          for (int i = 0; i < Math::kRows; i += Math::kBox) {
            copy_box(stage.rows[i / Math::kBox], inputs.b, sample, t, unit.row + i, full);
          }
          for (int i = 0; i < Math::kColumns; i += Math::kBox) {
            copy_box(stage.columns[i / Math::kBox], inputs.a, sample, t, unit.column + i, full);
          }
        }
      }
    }
  } else {
    take_registers<232>();
    const int group = static_cast<int>(threadIdx.x) / 128;
    const bool speaker = threadIdx.x % 128 == 0;
    float sums[Math::kSums];
    for (int64_t index = blockIdx.x; index < tiling.units(); index += gridDim.x) {
      const Unit unit = unit_at<Math>(tiling, o.batch, index);
      begin(unit);
      for (int sample = unit.first; sample < unit.last; ++sample) {
        int before = -1;  // the slot that is being multiplied while the next one is issued
        for (int t = 0; t < positions; t += Math::kStep, place.next()) {
          const typename Math::Stage& stage = shared.ring[place.slot];
          wait_for_phase(shared.full[place.slot], place.odd);
          begin_products();
#pragma unroll
          for (int k = 0; k < Math::kStep; k += 16) {
            multiply_boxes<S>(sums, stage.rows[group][k], stage.columns[0][k], kBoxBytes, t + k > 0);
          }
          commit_products();
          wait_for_products<1>(sums);
          if (before >= 0 && speaker) arrive(shared.empty[before]);
          before = place.slot;
        }
        wait_for_products<0>(sums);
        if (speaker) arrive(shared.empty[before]);
        finish(unit, sample, sums);
      }
      end(unit);
    }
  }
}

// A thread's sums to their places in a (rows, columns) matrix, of which they are a part of the tile at (row, column).
template <class Math, class Out, class A = typename Math::Sum>
__device__ __forceinline__ void store(const A (&sums)[Math::kSums], Out* __restrict__ to, int row, int column,
                                      int64_t rows, int64_t columns) {
#pragma unroll
  for (int i = 0; i < Math::kSums; ++i) {
    const int64_t r = row + Math::row(i), c = column + Math::column(i);
    if (r < rows && c < columns) to[r * columns + c] = core::from_accumulation<Out>(sums[i]);
  }
}

// --- launches ---

template <class Math>
Launch launch_of(const Inputs<Math>&, const Tiling& tiling) {
  return Launch{grid_for(tiling.units()), kThreads, kSharedBytes<Math, Adjacent::kOuter>};
}
template <class S, int kColumns>
Launch launch_of(const Inputs<Warpgroups<S, kColumns>>&, const Tiling& tiling) {
  using Math = Warpgroups<S, kColumns>;  // as many blocks as run at once, so that copies go ahead into the next unit
  return Launch{static_cast<int>(core::minimum(tiling.units(), multiprocessors())), Math::kBlockThreads,
                int{sizeof(typename Math::Shared)}};
}

// The mathematics to try first for operands of type S: warp groups for half types.
template <class S, class Otherwise, int kColumns>
using warpgroups_or = std::conditional_t<sizeof(typename Otherwise::Element) == 2, Warpgroups<S, kColumns>, Otherwise>;

// run(inputs) with those of the first mathematics that takes the operands.
template <class Math, class... Others, class Run>
cudaError_t with_inputs(const core::Operands& o, const Run& run) {
  if (const std::optional<Inputs<Math>> inputs = Inputs<Math>::of(o)) return run(*inputs);
  if constexpr (sizeof...(Others) > 0) {
    return with_inputs<Others...>(o, run);
  } else {
    return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace ghostgrad::cuda
