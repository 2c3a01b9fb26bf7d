// Working memory of one thread for the length of one call: cache-line aligned, counted, freed on the way out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/macros.h"

namespace ghostgrad::cpu {

class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next `count` elements, aligned to 64 bytes, uninitialised.
  template <class T>
  GHOSTGRAD_HD T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }
  // Room that `count` elements need, padding included: what the constructor's sum is made of.
  template <class T>
  GHOSTGRAD_HD static constexpr size_t room(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  void* take_bytes(size_t bytes);
  unsigned char* memory_;
  size_t size_, used_ = 0;
};

}  // namespace ghostgrad::cpu
