// Threads that wait asleep for work: none spins between calls, none is left behind in a forked child.
#pragma once
#include <atomic>
#include <cstdint>

typedef void (*Body)(void *context, int64_t thread, int64_t threads);

// Runs body(context, i, n) on n <= wanted threads, the caller's among them, and returns when all are done. Where the pool
// is at work for another caller, or no thread can be had, n is smaller, down to the caller alone.
void run_parallel(int64_t wanted, Body body, void *context);

class Barrier {  // for all threads of one run_parallel, which each name their number; may be used again and again
 public:
  void wait(int64_t threads);

 private:
  std::atomic<int64_t> arrived_{0}, phase_{0};
};
