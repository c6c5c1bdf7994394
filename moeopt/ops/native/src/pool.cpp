#include "pool.h"

#include <new>
#include <system_error>
#include <thread>
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace {

constexpr int SPINS = 2000;  // tens of microseconds: what the last tasks of a stage take, unless one has no core

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Pool {
  std::mutex busy;  // held by the one caller whose work the threads do
  std::mutex lock;
  std::condition_variable wake, done;
  int64_t started = 0, round = 0, wanted = 0, running = 0;  // wanted: the last number that may come in; 0 between rounds
  Body body = nullptr;
  void *context = nullptr;

  void loop(int64_t me) {
    int64_t seen = 0;
    std::unique_lock<std::mutex> held(lock);
    for (;;) {
      wake.wait(held, [&] { return round != seen; });
      seen = round;
      if (me > wanted) continue;
      running++;
      held.unlock();
      body(context, me);
      held.lock();
      if (--running == 0 && !wanted) done.notify_one();
    }
  }
};

Pool *pool = nullptr;

// A child of fork has the parent's memory and none of its threads: it begins anew (the old pool's memory is left).
void begin_anew() { pool = new (std::nothrow) Pool; }

Pool *the_pool() {
  static const bool ready = [] {
    begin_anew();
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, begin_anew);
#endif
    return true;
  }();
  return ready ? pool : nullptr;
}

}  // namespace

void run_parallel(int64_t wanted, Body body, void *context) {
  Pool *p = wanted > 1 ? the_pool() : nullptr;
  if (!p || !p->busy.try_lock()) return body(context, 0);
  std::unique_lock<std::mutex> held(p->lock);
  try {
    while (p->started < wanted - 1) {
      const int64_t me = p->started + 1;
      // a new thread must not take the last round for its own: it sees only what comes after this lock
      std::thread([p, me] { p->loop(me); }).detach();
      p->started = me;
    }
  } catch (const std::system_error &) {  // no more threads here
  }
  p->wanted = wanted - 1;
  p->body = body, p->context = context;
  p->round++;
  held.unlock();
  p->wake.notify_all();
  body(context, 0);
  held.lock();
  p->wanted = 0;
  p->done.wait(held, [&] { return p->running == 0; });
  held.unlock();
  p->busy.unlock();
}

void Progress::done(int64_t tasks, int64_t of) {
  if (done_.fetch_add(tasks) + tasks < of || !sleepers_.load()) return;
  std::lock_guard<std::mutex> held(lock_);  // a sleeper that has asked already is asleep by now
  all_.notify_all();
}

void Progress::wait(int64_t of) {
  for (int turn = 0; turn < SPINS; turn++) {
    if (done_.load() >= of) return;
    relax();
  }
  std::unique_lock<std::mutex> held(lock_);
  sleepers_++;
  all_.wait(held, [&] { return done_.load() >= of; });
  sleepers_--;
}
