// How a CPU kernel is spread over threads without knowing whose threads they are.
#pragma once

#include <cstdint>

namespace ghostgrad::cpu {

// Calls body(begin, end, context) on disjoint ranges that cover [0, count), in any order, on any threads, and returns
// when all are done. The bindings pass PyTorch's pool, the C++ tests a plain call. A plain function pointer, because a
// std::function would put template code into files that are compiled once per instruction set.
struct ParallelFor {
  // `grain`: units that a thread should get at least. Results must not depend on it.
  void (*run)(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context);

  // `operations` of all units together: waking a thread takes about as long as kOperationsPerThread of them.
  template <class Body>
  void operator()(int64_t count, double operations, Body& body) const {
    constexpr double kOperationsPerThread = 5e5;
    const double grain = operations > 0 ? static_cast<double>(count) * kOperationsPerThread / operations : 1;
    run(
        count,
        grain < 1                            ? 1
        : grain < static_cast<double>(count) ? static_cast<int64_t>(grain)
                                             : count,
        [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); }, &body);
  }
};

// Everything on the calling thread.
inline ParallelFor serial() {
  return ParallelFor{[](int64_t count, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
    if (count > 0) body(0, count, context);
  }};
}

}  // namespace ghostgrad::cpu
