#include "pool.h"

#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace {

struct Pool {
  std::mutex busy;  // held by the one caller whose work the threads do
  std::mutex lock;
  std::condition_variable wake, done;
  int64_t started = 0, round = 0, wanted = 0, running = 0, threads = 0;
  Body body = nullptr;
  void *context = nullptr;

  void loop(int64_t me) {
    int64_t seen = 0;
    std::unique_lock<std::mutex> held(lock);
    for (;;) {
      wake.wait(held, [&] { return round != seen; });
      seen = round;
      if (me > wanted) continue;
      held.unlock();
      body(context, me, threads);
      held.lock();
      if (--running == 0) done.notify_one();
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
  if (!p || !p->busy.try_lock()) return body(context, 0, 1);
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
  p->wanted = p->running = p->started < wanted - 1 ? p->started : wanted - 1;
  p->threads = p->wanted + 1;
  p->body = body, p->context = context;
  p->round++;
  held.unlock();
  p->wake.notify_all();
  body(context, 0, p->threads);
  held.lock();
  p->done.wait(held, [&] { return p->running == 0; });
  held.unlock();
  p->busy.unlock();
}

void Barrier::wait(int64_t threads) {
  if (threads == 1) return;
  const int64_t phase = phase_.load();
  if (arrived_.fetch_add(1) + 1 == threads) {
    arrived_.store(0);
    phase_.fetch_add(1);
    return;
  }
  // the others are at the last tasks of a stage: microseconds, unless one of them has no core
  for (int64_t turn = 0; phase_.load() == phase; turn++)
    if (turn > 1000) std::this_thread::yield();
}
