// Threads and their memory: scratch that is laid out before the threads begin, how they share the jobs of a
// phase, and how they wait for each other. They are OpenMP's where the compiler has it, for torch's are, too.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <thread>
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

// work(number, threads) on so many threads, or on fewer where OpenMP has no more.
#if defined(_OPENMP)
template <class Work> INLINE void on_threads(int threads, const Work& work) {
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num(), omp_get_num_threads());
}
#else
template <class Work> void on_threads(int threads, const Work& work) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back([&work, i, threads] { work(i, threads); });
  work(0, threads);
  for (std::thread& other : others) other.join();
}
#endif

INLINE void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // `yield` takes no time at all on most
#endif
}

// Where threads wait for each other: awake at first, because most waits are short and to fall asleep costs both
// the time to wake up and the turn on a core that others want; then asleep, because who stays awake takes the
// time of the very thread that is waited for. Of 3, 20, 300 and 1000 microseconds the last two kept most of the
// speed beside a busy process on each core.
class Meeting {
  static constexpr std::chrono::microseconds AWAKE{300};
  std::atomic<int> arrived{0}, round{0}, asleep{0};
  std::mutex door;
  std::condition_variable bell;

 public:
  void wait_for(int threads) {
    const int now = round.load();
    if (arrived.fetch_add(1) + 1 == threads) {
      arrived.store(0);
      round.store(now + 1);
      if (!asleep.load()) return;
      std::lock_guard<std::mutex> lock(door);
      return bell.notify_all();
    }
    const auto end = std::chrono::steady_clock::now() + AWAKE;
    do
      for (int i = 0; i < 16; i++) {
        if (round.load(std::memory_order_acquire) != now) return;
        pause();
      }
    while (std::chrono::steady_clock::now() < end);
    asleep.fetch_add(1);
    std::unique_lock<std::mutex> lock(door);
    bell.wait(lock, [&] { return round.load() != now; });
    asleep.fetch_sub(1);
  }
};

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
  Meeting& meeting;

  // Ends a phase: what any thread wrote before is seen by all after it.
  void meet() {
    meeting.wait_for(threads);
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
template <class Work> INLINE void parallel(int asked, const Work& work) {
  std::vector<Counter> counters(3 * (size_t)asked);
  Meeting meeting;
  on_threads(asked, [&](int number, int threads) {
    Thread thread{counters.data(), number, threads, asked, 0, meeting};
    work(thread);
    thread.meet();  // here who waits may sleep
  });
}

}  // namespace
