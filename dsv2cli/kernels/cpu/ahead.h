// Weights in a mapped file that is larger than memory. The system is asked for those that a product will need
// before it begins: all are read at once, and nothing around them, where a fault would wait for one read and
// bring what the system thinks comes next.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include "matrix.h"

namespace {

// A longer request is cut to what the device takes or the system reads ahead by itself; few have less.
constexpr size_t ASKED_AT_ONCE = 1 << 17;

INLINE void ask_for(const void* from, size_t count) {
  static const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  const uintptr_t begin = (uintptr_t)from / page * page, end = (uintptr_t)from + count;
  for (uintptr_t at = begin; at < end; at += ASKED_AT_ONCE)
    madvise((void*)at, std::min<size_t>(ASKED_AT_ONCE, end - at), MADV_WILLNEED);
}
// One matrix of a stack.
NOINLINE void ask_for(const Matrix& stack, int index) {
  const Matrix w = stack.of_stack(index);
  ask_for(w.codes, stack.codes_stride);
  if (w.scales) ask_for(w.scales, stack.scales_stride);
  if (w.supers) ask_for(w.supers, stack.supers_stride);
}

}  // namespace
