#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace ghostgrad::cpu {

Scratch::Scratch(size_t bytes) : memory_(nullptr), size_((bytes + 63) / 64 * 64) {
  if (size_ == 0) return;
  memory_ = static_cast<unsigned char*>(std::aligned_alloc(64, size_));
  if (memory_ == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() { std::free(memory_); }

void* Scratch::take_bytes(size_t bytes) {
  const size_t room = (bytes + 63) / 64 * 64;
  if (used_ + room > size_) throw std::bad_alloc();  // a kernel took more than it announced
  void* taken = memory_ + used_;
  used_ += room;
  return taken;
}

}  // namespace ghostgrad::cpu
