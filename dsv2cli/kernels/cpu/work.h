// Threads and their memory: scratch that is laid out before the threads begin, and how they share the jobs of
// a phase. With OpenMP where the compiler has it, else with one thread.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "vector.h"

namespace {

// Scratch memory of the thread that calls, which the others share. It grows until that thread ends.
struct Arena {
  char* base = nullptr;
  size_t size = 0;
  uintptr_t hold(size_t wanted) {
    if (wanted > size) {
      free(base);
      size = (wanted + wanted / 4 + 63) / 64 * 64;
      base = (char*)aligned_alloc(64, size);
    }
    return (uintptr_t)base;
  }
  ~Arena() { free(base); }
};
thread_local Arena arena;

// Hands out scratch, one array after the other. With at = 0 it only adds up the bytes needed.
struct Scratch {
  uintptr_t at;
  template <class T> T* take(size_t count) {
    T* out = (T*)at;
    at += (count * sizeof(T) + 63) / 64 * 64;
    return out;
  }
};

#if defined(_OPENMP)
INLINE int thread_number() { return omp_get_thread_num(); }
INLINE int thread_count() { return omp_get_num_threads(); }
inline void barrier() {
#pragma omp barrier
}
#else
INLINE int thread_number() { return 0; }
INLINE int thread_count() { return 1; }
inline void barrier() {}
#endif

struct alignas(64) Counter {
  std::atomic<int> next{0};
};

// One of the threads of a `parallel`, and how it comes by its jobs, phase by phase. Each thread has a share
// of consecutive jobs, because memory gives most to a thread that reads consecutive addresses. One that is
// done with its share helps the next thread: on a shared machine one core may be slower than the other.
struct Thread {
  // [3][threads]: of the phase before (which may be set to zero now), of this phase and of the next one.
  Counter* counters;
  // OpenMP may give fewer threads than were asked for; scratch and jobs are laid out for `asked`.
  int number, threads, asked, phase = 0;
  explicit Thread(std::vector<Counter>& counters)
      : counters(counters.data()),
        number(thread_number()),
        threads(thread_count()),
        asked((int)counters.size() / 3) {}

  // Ends a phase: what any thread wrote before is seen by all after it.
  void meet() {
    barrier();
    phase = (phase + 1) % 3;
    counters[(phase + 1) % 3 * threads + number].next.store(0, std::memory_order_relaxed);
  }
  // A job below `count` that nobody has done in this phase, or `count` if there is none.
  int next_job(int count) {
    for (int helped = 0; helped < threads; helped++) {
      const int64_t owner = (number + helped) % threads;
      const int begin = (int)(count * owner / threads), end = (int)(count * (owner + 1) / threads);
      std::atomic<int>& next = counters[phase * threads + owner].next;
      if (begin + next.load(std::memory_order_relaxed) >= end) continue;
      const int job = begin + next.fetch_add(1, std::memory_order_relaxed);
      if (job < end) return job;
    }
    return count;
  }
  template <class Work> INLINE void each(int count, const Work& work) {
    for (int job; (job = next_job(count)) < count;) work(job);
  }
  // The same; `work` also gets the job that this thread does afterwards, to ask for its weights in time. It
  // is `count` where there is none.
  template <class Work> INLINE void each_ahead(int count, const Work& work) {
    for (int job = next_job(count), after; job < count; job = after) {
      after = next_job(count);
      work(job, after);
    }
  }
};

// work(Thread&) on so many threads.
template <class Work> INLINE void parallel(int threads, const Work& work) {
  std::vector<Counter> counters(3 * (size_t)threads);
#pragma omp parallel num_threads(threads)
  {
    Thread thread(counters);
    work(thread);
  }
}

}  // namespace
