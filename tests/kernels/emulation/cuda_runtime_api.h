// Pretends to be CUDA's header of this name, so that g++ can compile the kernels and run them on a machine without a
// GPU.
//
// What it is for: tests/kernels/test_emulated.cpp runs every kernel, thread by thread, and compares the results with
// the CPU's. Wrong indices, tails, missing or divergent barriers go red here. What it cannot see: alignment, memory
// spaces, speed.
//
// How: a thread is a context with a stack of its own. A block's threads run one after the other, each until it waits
// for its block (a barrier) or for its warp (a shuffle); who has waited long enough goes on. The order is a knob, and a
// warp runs far ahead of others if nothing stops it: a missing barrier makes results depend on that. Shared memory is a
// static variable, since blocks run one after the other.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

namespace emulation {

struct Dimensions {
  unsigned x = 0, y = 0, z = 0;
};
inline Dimensions thread_index, block_index, grid_size;

enum class Order { kForwards, kBackwards, kShuffled };
inline Order order = Order::kForwards;
inline int64_t max_blocks = INT64_MAX;  // fewer blocks than asked for, to see kernels stride

constexpr size_t kStackBytes = 1 << 16;
constexpr int kMaxThreads = 1024;

enum class State { kRuns, kWaitsForWarp, kWaitsForBlock, kFinished };

// A context starts a thread on its own stack; from then on jumps switch, since a context's switch costs two system
// calls.
struct Thread {
  ucontext_t context;
  jmp_buf waiting;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kFinished;
};
inline std::vector<Thread> threads(kMaxThreads);
inline jmp_buf scheduler;
inline int current = 0;
inline std::function<void()> body;
inline double shuffle_slots[kMaxThreads];

inline void wait(State what_for) {
  threads[current].state = what_for;
  if (_setjmp(threads[current].waiting) == 0) _longjmp(scheduler, 1);
}

inline void resume(Thread& thread) {
  if (_setjmp(scheduler) != 0) return;  // the thread waits or has finished
  if (thread.started) _longjmp(thread.waiting, 1);
  thread.started = true;
  setcontext(&thread.context);
}

inline double shuffle_down(double value, int offset) {
  const int me = current;
  shuffle_slots[me] = value;
  wait(State::kWaitsForWarp);
  const double result = me % 32 + offset < 32 ? shuffle_slots[me + offset] : value;
  wait(State::kWaitsForWarp);
  return result;
}

inline void run_thread() {
  body();
  threads[current].state = State::kFinished;
  _longjmp(scheduler, 1);
}

inline void run_block(int count) {
  for (int t = 0; t < count; ++t) {
    Thread& thread = threads[t];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    thread.started = false;
    thread.state = State::kRuns;
    makecontext(&thread.context, run_thread, 0);
  }
  std::vector<int> turn(count);
  std::iota(turn.begin(), turn.end(), 0);
  if (order == Order::kBackwards) std::reverse(turn.begin(), turn.end());
  static std::mt19937 generator(0);
  const auto all = [](int first, int last, State state) {
    for (int t = first; t < last; ++t) {
      if (threads[t].state != state) return false;
    }
    return true;
  };
  const auto release = [](int first, int last) {
    for (int t = first; t < last; ++t) threads[t].state = State::kRuns;
  };
  // A warp runs as far as it can before the next one gets its turn: to the next barrier of the block, through any
  // number of its own.
  while (!all(0, count, State::kFinished)) {
    if (order == Order::kShuffled) std::shuffle(turn.begin(), turn.end(), generator);
    bool progress = false;
    for (int t : turn) {
      const int first = t / 32 * 32, last = first + 32;
      for (int lane = first; lane < last; ++lane) {
        const int next = order == Order::kBackwards ? last - 1 - (lane - first) : lane;
        if (threads[next].state != State::kRuns) continue;
        current = next;
        thread_index.x = static_cast<unsigned>(next);
        resume(threads[next]);
        progress = true;
      }
      if (all(first, last, State::kWaitsForWarp)) {
        release(first, last);
        progress = true;
      }
    }
    if (all(0, count, State::kWaitsForBlock)) {
      release(0, count);
      progress = true;
    }
    if (!progress) {
      std::printf("divergent barrier: some threads of a block wait for others that never come\n");
      std::exit(1);
    }
  }
}

template <class... Parameters, class... Arguments>
void launch(cudaStream_t, int64_t blocks, int count, void (*kernel)(Parameters...), Arguments... arguments) {
  if (blocks <= 0) {
    std::printf("a grid of %ld blocks is not allowed\n", static_cast<long>(blocks));
    std::exit(1);
  }
  grid_size.x = static_cast<unsigned>(blocks < max_blocks ? blocks : max_blocks);
  body = [&] { kernel(arguments...); };
  for (block_index.x = 0; block_index.x < grid_size.x; ++block_index.x) run_block(count);
}

}  // namespace emulation

#define threadIdx (::emulation::thread_index)
#define blockIdx (::emulation::block_index)
#define gridDim (::emulation::grid_size)
inline void __syncthreads() { emulation::wait(emulation::State::kWaitsForBlock); }
inline double __shfl_down_sync(unsigned, double value, int offset) { return emulation::shuffle_down(value, offset); }
