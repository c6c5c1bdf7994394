// Threads that wait asleep for work: none spins between calls, none is left behind in a forked child.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

typedef void (*Body)(void *context, int64_t thread);

// Runs body(context, 0) on the caller's thread and body(context, i), i < wanted, on each other one that comes before the
// caller's has returned; returns when all that came are out. So a call never waits for a thread that has no core.
// Where the pool is at work for another caller, or no thread can be had, the caller is alone.
void run_parallel(int64_t wanted, Body body, void *context);

// How many of a stage's tasks are done. Only a thread that holds a task is waited for, a moment awake and then asleep,
// so that it gets the core where both have but one.
class Progress {
 public:
  void done(int64_t tasks, int64_t of);
  void wait(int64_t of);

 private:
  std::atomic<int64_t> done_{0}, sleepers_{0};
  std::mutex lock_;
  std::condition_variable all_;
};
