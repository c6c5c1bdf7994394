#include "team.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace {

// What a compiler makes of `#pragma omp parallel`: libgomp's entry, which LLVM's and Intel's OpenMP have as well. It is asked
// for by name, so that the library needs no OpenMP and meets the one of the process, not a second one beside it.
typedef void (*Parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
std::atomic<Parallel> parallel{nullptr};
std::mutex busy;

struct Shared {
  Body body;
  void *context;
  std::atomic<int64_t> came{0};

  static void work(void *data) {
    Shared &s = *(Shared *)data;
    s.body(s.context, s.came++);
  }
};

#if defined(__linux__)
void leave() {
  parallel = nullptr;
  new (&busy) std::mutex;  // a caller of the parent's may have held it
}

// A child of fork that has begun no program of its own. Its parent may have used OpenMP before this library was loaded.
bool forked() {
  FILE *stat = fopen("/proc/self/stat", "r");
  if (!stat) return true;
  char text[512] = {};
  const size_t size = fread(text, 1, sizeof text - 1, stat);
  fclose(stat);
  const char *name = size ? strrchr(text, ')') : nullptr;
  unsigned flags = 0;
  constexpr unsigned PF_FORKNOEXEC = 0x40;
  return !name || sscanf(name + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) != 1 || flags & PF_FORKNOEXEC;
}

void find() {
  if (forked() || pthread_atfork(nullptr, nullptr, leave)) return;
  parallel = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
}
#else
void find() {}
#endif

}  // namespace

bool has_team() {
  static const bool asked = (find(), true);
  return asked && parallel.load();
}

void run_team(int64_t threads, Body body, void *context) {
  const Parallel run = parallel.load();
  if (!run || !busy.try_lock()) return body(context, 0);
  Shared shared{body, context};
  run(Shared::work, &shared, (unsigned)threads, 0);
  busy.unlock();
}
