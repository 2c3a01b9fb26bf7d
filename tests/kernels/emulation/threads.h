// A block of GPU threads on one thread of a CPU.
//
// Each thread has a stack of its own and runs until it waits; a wait is a condition, and who waits for a condition that
// holds goes on. Everything that threads do together is made of that: the last of a warp to arrive at an operation
// carries it out for all lanes, the last of a block to arrive at a barrier opens it. A warp runs as far ahead of the
// others as its waits allow, so a missing barrier changes results; the order of warps, lanes and blocks is a knob.
//
// When no thread of a block can go on, what hardware may do late is done (`late`); when there is nothing of that kind,
// the threads wait for each other and the program ends with the list of what they wait for.
#pragma once

#include <link.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

struct Dimensions {
  unsigned x = 1, y = 1, z = 1;
};
inline Dimensions thread_index, block_index, block_size, grid_size;

// Which thread, warp and block goes first, and when asynchronous copies land: as late or as early as they may, or now
// this and now that.
enum class Order { kForwards, kBackwards, kShuffled };
inline Order order = Order::kForwards;
inline int64_t max_blocks = INT64_MAX;  // fewer blocks than asked for, to see kernels stride
inline bool hopper = true;              // whether the device is one
inline std::mt19937 generator(0);

constexpr int kMaxThreads = 1024, kLanes = 32, kWarpgroup = 128;
constexpr int kMaxSharedBytes = 227 * 1024;  // of a block on sm_90

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  std::printf("block %u, thread %u: ", block_index.x, thread_index.x);
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
  std::fflush(stdout);
  std::_Exit(1);
}

// --- stacks ---

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 1 << 18;  // red zones take room
#else
constexpr size_t kStackBytes = 1 << 16;
#endif

#if defined(__x86_64__)
using Context = void*;  // the stack pointer; the registers that a call preserves are on the stack

__attribute__((naked, noipa)) inline void switch_context(Context& /*left*/, Context /*entered*/) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
inline void make_context(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;  // 16-byte aligned, as a call leaves it
  *top = reinterpret_cast<void*>(entry);
  context = std::fill_n(top - 6, 6, nullptr) - 6;
}
#else
using Context = ucontext_t;

inline void switch_context(Context& left, Context& entered) { swapcontext(&left, &entered); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

// --- threads ---

// A copy on its way to shared memory, and how many groups its thread had committed before.
struct Copy {
  void* shared;
  const void* global;
  int bytes, room;
  int group;
};

struct Thread {
  Context context;
  const void* stack = nullptr;  // and its size, for the address sanitizer
  size_t stack_bytes = kStackBytes;
  void* fake_stack = nullptr;            // the address sanitizer's
  bool (*ready)(const void*) = nullptr;  // null if it waits for nothing
  const void* condition = nullptr;       // what `ready` looks at
  const char* waits_for = "";
  bool finished = false;
  std::vector<Copy> copies;
  int groups = 0;  // committed
};
inline std::vector<Thread> threads(kMaxThreads);
inline std::vector<char> stacks(kMaxThreads* kStackBytes);
inline Thread scheduler;
inline int thread_count = 0;
inline int current = 0;
inline std::function<void()> body;
inline std::deque<std::function<void()>> late;  // what happens at the latest when nobody can go on

inline void switch_thread(Thread& left, Thread& entered) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(left.finished ? nullptr : &left.fake_stack, entered.stack, entered.stack_bytes);
#endif
  switch_context(left.context, entered.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(left.fake_stack, nullptr, nullptr);
#endif
}

// The calling thread goes on when `condition()` holds.
template <class Condition>
void wait_until(const char* what, const Condition& condition) {
  if (condition()) return;
  Thread& thread = threads[static_cast<size_t>(current)];
  thread.ready = [](const void* given) { return (*static_cast<const Condition*>(given))(); };
  thread.condition = &condition;
  thread.waits_for = what;
  switch_thread(thread, scheduler);
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
#endif
  body();
  Thread& thread = threads[static_cast<size_t>(current)];
  thread.finished = true;
  switch_thread(thread, scheduler);
}

// Whether the thread did anything.
inline bool resume(int number) {
  Thread& thread = threads[static_cast<size_t>(number)];
  if (thread.finished || (thread.ready != nullptr && !thread.ready(thread.condition))) return false;
  thread.ready = nullptr;
  current = number;
  thread_index.x = static_cast<unsigned>(number);
  switch_thread(scheduler, thread);
  return true;
}

inline int chance(int of) { return static_cast<int>(generator() % static_cast<unsigned>(of)); }

// Lanes go on in turn until none can, or, shuffled, until others get their turn. Whether any did.
inline bool run_warp(int warp) {
  bool any = false;
  int rounds = order == Order::kShuffled ? 1 + chance(64) : INT32_MAX;
  for (bool progress = true; progress && rounds-- > 0; any = any || progress) {
    progress = false;
    const int start = order == Order::kShuffled ? chance(kLanes) : order == Order::kBackwards ? kLanes - 1 : 0;
    const int step = order == Order::kShuffled ? 2 * chance(kLanes / 2) + 1 : order == Order::kBackwards ? -1 : 1;
    for (int i = 0; i < kLanes; ++i) progress |= resume(warp * kLanes + ((start + i * step) & (kLanes - 1)));
  }
  return any;
}

[[noreturn]] inline void fail_by_deadlock() {
  std::printf("threads of a block wait for what never happens:\n");
  const auto what = [](int t) {
    return threads[static_cast<size_t>(t)].finished ? "" : threads[static_cast<size_t>(t)].waits_for;
  };
  for (int first = 0, last; first < thread_count; first = last) {
    for (last = first + 1; last < thread_count && std::strcmp(what(last), what(first)) == 0;) ++last;
    std::printf("  threads %d to %d: %s\n", first, last - 1, what(first)[0] == '\0' ? "finished" : what(first));
  }
  fail("divergence");
}

// --- shared memory ---

// `__shared__` makes variables thread_local, and a grid runs on a thread of its own: the program's thread-local memory
// there is the block's static shared memory, and nobody else's.
struct Memory {
  unsigned char* data = nullptr;
  size_t bytes = 0;
};
inline Memory static_shared, dynamic_shared;

inline Memory thread_local_memory() {
  Memory result;
  dl_iterate_phdr(
      [](dl_phdr_info* program, size_t, void* to) {
        for (int i = 0; i < program->dlpi_phnum; ++i) {
          if (program->dlpi_phdr[i].p_type != PT_TLS) continue;
          *static_cast<Memory*>(to) = {static_cast<unsigned char*>(program->dlpi_tls_data),
                                       static_cast<size_t>(program->dlpi_phdr[i].p_memsz)};
        }
        return 1;  // the program comes first, libraries after it
      },
      &result);
  return result;
}

inline bool is_shared(const void* address, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const auto inside = [&](const Memory& memory) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(memory.data);
    return at >= from && at + bytes <= from + memory.bytes;
  };
  return inside(static_shared) || inside(dynamic_shared);
}

// NaN everywhere, so that what is read before it is written shows.
inline void poison_shared() {
  for (const Memory& memory : {static_shared, dynamic_shared}) std::fill_n(memory.data, memory.bytes, 0xff);
}

// --- what threads do together ---

struct Collective {
  const char* name = "";
  int arrived = 0;
  uint32_t generation = 0;
  void* operands[kWarpgroup];

  // A warp group's asynchronous products, each with the number of groups that were committed before it.
  std::vector<std::pair<int, std::function<void()>>> products;
  int groups = 0;
  bool begun = false;
};
inline Collective warps[kMaxThreads / kLanes], warpgroups[kMaxThreads / kWarpgroup];

// compute(operands) once, operands[i] being what lane i of the warp (or thread i of the group of kSize threads) gave.
template <int kSize, class Operands, class Compute>
void together(const char* name, Operands& mine, const Compute& compute) {
  static_assert(kSize == kLanes || kSize == kWarpgroup, "a warp or four");
  Collective& group = kSize == kLanes ? warps[current / kLanes] : warpgroups[current / kWarpgroup];
  if (group.arrived == 0) group.name = name;
  if (group.name != name && std::strcmp(group.name, name) != 0)
    fail("divergence: %s while others are at %s", name, group.name);
  group.operands[current % kSize] = &mine;
  if (++group.arrived == kSize) {
    group.arrived = 0;
    ++group.generation;
    compute(reinterpret_cast<Operands**>(group.operands));
  } else {
    wait_until(name, [&group, generation = group.generation] { return group.generation != generation; });
  }
}

struct Barrier {
  int arrived = 0, expected = 0;
  uint32_t generation = 0;
};
inline Barrier barriers[16];

inline void arrive(Barrier& barrier, int expected) {
  if (barrier.arrived == 0) barrier.expected = expected;
  if (barrier.expected != expected) fail("a barrier of %d and of %d threads", barrier.expected, expected);
  if (++barrier.arrived < expected) return;
  barrier.arrived = 0;
  ++barrier.generation;
}

inline void arrive_and_wait(const char* name, Barrier& barrier, int expected) {
  const uint32_t generation = barrier.generation;
  arrive(barrier, expected);
  wait_until(name, [&barrier, generation] { return barrier.generation != generation; });
}

// --- blocks ---

inline void run_block() {
  for (int t = 0; t < thread_count; ++t) {
    Thread& thread = threads[static_cast<size_t>(t)];
    char* stack = &stacks[static_cast<size_t>(t) * kStackBytes];
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes);  // the frames that nobody returned from
#endif
    make_context(thread.context, stack, run_thread);
    thread.stack = stack;
    thread.ready = nullptr;
    thread.finished = false;
    thread.copies.clear();
    thread.groups = 0;
  }
  std::fill(std::begin(warps), std::end(warps), Collective{});
  std::fill(std::begin(warpgroups), std::end(warpgroups), Collective{});
  std::fill(std::begin(barriers), std::end(barriers), Barrier{});
  poison_shared();

  std::vector<int> turn(static_cast<size_t>(thread_count / kLanes));
  std::iota(turn.begin(), turn.end(), 0);
  if (order == Order::kBackwards) std::reverse(turn.begin(), turn.end());
  const auto finished = [](const Thread& thread) { return thread.finished; };
  while (!std::all_of(threads.begin(), threads.begin() + thread_count, finished)) {
    if (order == Order::kShuffled) std::shuffle(turn.begin(), turn.end(), generator);
    bool progress = false;
    for (int warp : turn) progress |= run_warp(warp);
    if (late.empty() || (progress && (order != Order::kShuffled || chance(2) == 0))) {
      if (!progress) fail_by_deadlock();
      continue;
    }
    const auto event = late.begin() + (order == Order::kShuffled ? chance(static_cast<int>(late.size())) : 0);
    const std::function<void()> happen = std::move(*event);
    late.erase(event);
    happen();
  }
  while (!late.empty()) {
    late.front()();
    late.pop_front();
  }
}

template <class... Parameters, class... Arguments>
void run_grid(int blocks, int block_threads, int shared_bytes, void (*kernel)(Parameters...),
              const Arguments&... arguments) {
  if (blocks <= 0 || block_threads <= 0 || block_threads > kMaxThreads || block_threads % kLanes != 0 ||
      shared_bytes < 0 || shared_bytes > kMaxSharedBytes) {
    fail("not allowed: %d blocks of %d threads with %d bytes", blocks, block_threads, shared_bytes);
  }
  thread_count = block_threads;
  block_size.x = static_cast<unsigned>(block_threads);
  grid_size.x = static_cast<unsigned>(std::min<int64_t>(blocks, max_blocks));
  body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  constexpr size_t kAlignment = 1024;
  const size_t room = (static_cast<size_t>(shared_bytes) + kAlignment) / kAlignment * kAlignment;
  dynamic_shared = {static_cast<unsigned char*>(std::aligned_alloc(kAlignment, room)),
                    static_cast<size_t>(shared_bytes)};
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(dynamic_shared.data + dynamic_shared.bytes, room - dynamic_shared.bytes);
#endif
  std::thread([] {
    static_shared = thread_local_memory();
    for (unsigned block = 0; block < grid_size.x; ++block) {
      block_index.x = order == Order::kBackwards ? grid_size.x - 1 - block : block;
      run_block();
    }
  }).join();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(dynamic_shared.data, room);
#endif
  std::free(dynamic_shared.data);
  dynamic_shared = static_shared = {};
}

}  // namespace emulation
