// csrc/cuda/hopper.cuh for the CPU: the same declarations over the emulation. What they mean is said there.
//
// Copies and products happen as late as they may, as early as they may, or now this and now that, with the order of
// threads: a copy when nobody can go on without it or when it is issued, a product when it is waited for or issued.
#pragma once

#include <cstring>
#include <vector>

#include "cuda/primitives.cuh"

namespace ghostgrad::cuda {

inline bool has_warpgroups() { return emulation::hopper; }
inline int multiprocessors() { return 3; }

// --- barriers that count bytes ---

struct alignas(8) Barrier {
  uint64_t state;
};

namespace emulated {

struct BarrierState {
  uint16_t odd : 1, published : 1, expected : 14;  // all ones in memory that was not initialised
  uint16_t pending;
  int32_t bytes;
};
static_assert(sizeof(BarrierState) == sizeof(Barrier));

inline std::vector<Barrier*> initialised;  // and not published yet

// change(state) of an initialised barrier, whose phase may end by that.
template <class Change>
void change_barrier(Barrier& barrier, const Change& change) {
  BarrierState state;
  std::memcpy(&state, &barrier, sizeof(state));
  if (state.expected == 0x3fff) emulation::fail("a barrier was not initialised");
  change(state);
  if (state.bytes <= -(1 << 20) || state.bytes >= 1 << 20) emulation::fail("a barrier cannot count that many bytes");
  if (state.pending == 0 && state.bytes == 0) {
    state.odd ^= 1;
    state.pending = state.expected;
  }
  std::memcpy(static_cast<void*>(&barrier), &state, sizeof(state));
}

inline void arrive(BarrierState& state) {
  if (state.pending == 0) emulation::fail("a barrier has more arrivals than it expects");
  --state.pending;
}

}  // namespace emulated

inline void init_barrier(Barrier& barrier, int arrivals) {
  emulated::check_shared("init_barrier", &barrier, sizeof(barrier));
  emulated::BarrierState state{};
  state.expected = static_cast<uint16_t>(arrivals & 0x3fff);
  state.pending = static_cast<uint16_t>(arrivals);
  std::memcpy(static_cast<void*>(&barrier), &state, sizeof(state));
  emulated::initialised.push_back(&barrier);
}
inline void publish_barriers() {
  for (Barrier* barrier : emulated::initialised) {
    emulated::change_barrier(*barrier, [](emulated::BarrierState& state) { state.published = 1; });
  }
  emulated::initialised.clear();
}
inline void arrive(Barrier& barrier) { emulated::change_barrier(barrier, emulated::arrive); }
inline void arrive_and_expect(Barrier& barrier, int bytes) {
  emulated::change_barrier(barrier, [bytes](emulated::BarrierState& state) {
    state.bytes += bytes;
    emulated::arrive(state);
  });
}
inline void wait_for_phase(Barrier& barrier, bool odd) {
  emulated::change_barrier(barrier, [](emulated::BarrierState&) {});  // is it one?
  emulation::wait_until("a phase of a barrier", [&barrier, odd] {
    emulated::BarrierState state;
    std::memcpy(&state, &barrier, sizeof(state));
    return (state.odd != 0) != odd;
  });
}

// --- bulk copies ---

struct TensorMap {
  const uint16_t* data;
  int64_t sizes[3], strides[2];
  int box_rows;
};

inline bool make_tensor_map(TensorMap& map, core::DType, const void* data, const int64_t (&sizes)[3],
                            const int64_t (&strides)[2], int box_rows) {
  map.data = static_cast<const uint16_t*>(data);
  map.box_rows = box_rows;
  bool taken = reinterpret_cast<uintptr_t>(data) % 16 == 0 && box_rows <= 256;
  for (int i = 0; i < 3; ++i) taken = taken && (map.sizes[i] = sizes[i]) > 0;
  for (int i = 0; i < 2; ++i) taken = taken && (map.strides[i] = strides[i]) > 0 && strides[i] % 8 == 0;
  return taken;
}

inline void copy_box(void* shared, const TensorMap& map, int matrix, int row, int column, Barrier& barrier) {
  const int bytes = map.box_rows * 128;
  if (reinterpret_cast<uintptr_t>(shared) % 1024 != 0) emulation::fail("copy_box: misaligned in shared memory");
  if (!emulation::is_shared(shared, static_cast<size_t>(bytes))) emulation::fail("copy_box: not in shared memory");
  emulated::change_barrier(barrier, [](emulated::BarrierState& state) {
    if (state.published == 0) emulation::fail("copy_box: the barrier was not published");
  });
  const auto land = [=, &barrier] {
    for (int r = 0; r < map.box_rows; ++r) {
      for (int c = 0; c < 64; ++c) {
        const bool inside = matrix >= 0 && matrix < map.sizes[0] && row + r >= 0 && row + r < map.sizes[1] &&
                            column + c >= 0 && column + c < map.sizes[2];
        const uint16_t element =
            inside ? map.data[matrix * map.strides[0] + (row + r) * map.strides[1] + column + c] : uint16_t{0};
        const int chunk = c / 8 ^ r % 8;
        std::memcpy(static_cast<unsigned char*>(shared) + r * 128 + chunk * 16 + c % 8 * 2, &element, 2);
      }
    }
    emulated::change_barrier(barrier, [bytes](emulated::BarrierState& state) { state.bytes -= bytes; });
  };
  emulated::early() ? land() : emulation::late.push_back(land);
}

// --- products of warp groups ---

namespace emulated {

// Those of the first `groups` groups.
inline void perform_products(emulation::Collective& group, int groups) {
  size_t done = 0;
  while (done < group.products.size() && group.products[done].first < groups) group.products[done++].second();
  group.products.erase(group.products.begin(), group.products.begin() + static_cast<std::ptrdiff_t>(done));
}

// act(group) once for the four warps of the group.
template <class Act>
void by_warpgroup(const char* name, const Act& act) {
  emulation::Collective& group = emulation::warpgroups[emulation::current / emulation::kWarpgroup];
  int nothing = 0;
  emulation::together<emulation::kWarpgroup>(name, nothing, [&](int**) { act(group); });
}

// Element (k, column) of a box and of those to its right: shared memory is swizzled by address.
template <class S>
float box_element(const void* box, int box_bytes, int k, int column) {
  uintptr_t at =
      reinterpret_cast<uintptr_t>(box) + static_cast<uintptr_t>(column / 64 * box_bytes + k * 128 + column % 64 * 2);
  at ^= (at >> 7 & 7) << 4;
  S element;
  if (!emulation::is_shared(reinterpret_cast<const void*>(at), 2))
    emulation::fail("a product outside of shared memory");
  std::memcpy(static_cast<void*>(&element), reinterpret_cast<const void*>(at), 2);
  return core::to_accumulation(element);
}

}  // namespace emulated

template <int kCount>
void give_registers_back() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "what can be had");
  emulated::by_warpgroup("give_registers_back", [](emulation::Collective&) {});
}
template <int kCount>
void take_registers() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "what can be had");
  emulated::by_warpgroup("take_registers", [](emulation::Collective&) {});
}

inline void begin_products() {
  emulated::by_warpgroup("begin_products", [](emulation::Collective& group) { group.begun = true; });
}
inline void commit_products() {
  emulated::by_warpgroup("commit_products", [](emulation::Collective& group) {
    ++group.groups;
    group.begun = false;
  });
}

template <class S, int kSums>
void multiply_boxes(float (&d)[kSums], const void* a, const void* b, int box_bytes, bool accumulate) {
  static_assert(sizeof(S) == 2, "half types");
  struct Operands {
    float* d;
    const void *a, *b;
    int box_bytes;
    bool accumulate;
  } mine{d, a, b, box_bytes, accumulate};
  emulation::together<emulation::kWarpgroup>("multiply_boxes", mine, [](Operands** threads) {
    const Operands first = *threads[0];
    std::vector<float*> sums;
    for (int i = 0; i < emulation::kWarpgroup; ++i) {
      if (threads[i]->a != first.a || threads[i]->b != first.b || threads[i]->accumulate != first.accumulate) {
        emulation::fail("the threads of a warp group multiply different boxes");
      }
      sums.push_back(threads[i]->d);
    }
    emulation::Collective& group = emulation::warpgroups[emulation::current / emulation::kWarpgroup];
    if (!group.begun) emulation::fail("multiply_boxes without begin_products");
    group.products.emplace_back(group.groups, [first, sums] {
      constexpr int kColumns = 2 * kSums, kDepth = 16;
      static float d[64][kColumns], b[kDepth][kColumns];
      for (int k = 0; k < kDepth; ++k) {
        for (int c = 0; c < kColumns; ++c) b[k][c] = emulated::box_element<S>(first.b, first.box_bytes, k, c);
      }
      const auto exchange = [&](const auto& with) {  // (sum of a thread, its place)
        for (int t = 0; t < emulation::kWarpgroup; ++t) {
          for (int i = 0; i < kSums; ++i) {
            with(sums[static_cast<size_t>(t)][i],
                 d[t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8][i / 4 * 8 + t % 4 * 2 + i % 2]);
          }
        }
      };
      exchange([&](float& sum, float& place) { place = first.accumulate ? sum : 0.0f; });
      for (int r = 0; r < 64; ++r) {
        for (int k = 0; k < kDepth; ++k) {
          const float a = emulated::box_element<S>(first.a, first.box_bytes, k, r);
          for (int c = 0; c < kColumns; ++c) d[r][c] += a * b[k][c];
        }
      }
      exchange([](float& sum, float& place) { sum = place; });
    });
    if (emulated::early()) emulated::perform_products(group, group.groups + 1);
  });
}

template <int kPending, int kSums>
void wait_for_products(float (&)[kSums]) {
  emulated::by_warpgroup("wait_for_products", [](emulation::Collective& group) {
    emulated::perform_products(group, group.groups - kPending);
  });
}

}  // namespace ghostgrad::cuda
