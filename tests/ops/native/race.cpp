// Calls of the kernel by several callers at once, on threads of the pool or of the team, under a sanitizer that tells of
// data races. Each call must give the bits that one thread gives. Compiled with -DTEAM=GOMP_parallel the library finds a
// team, with another name none, and takes its pool. Arguments: how many calls each caller makes of each block; 0: a race
// of this file's own, which the sanitizer must tell.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "moeopt_experts.h"

// A team as OpenMP has one: the library finds it by this name. Threads of the standard library, since the sanitizer sees
// when they begin and end; GCC's own OpenMP is not built for it.
extern "C" __attribute__((visibility("default"))) void TEAM(void (*work)(void *), void *data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; i++) others.emplace_back(work, data);
  work(data);
  for (auto &one : others) one.join();
}

namespace {

struct Block {
  int64_t T, K, E, H, I;
  std::vector<float> x, w, weights;
  std::vector<int64_t> ids;
  std::vector<moeopt_expert> experts;
  std::vector<int64_t> index;
  moeopt_spec spec{};

  Block(int64_t T, int64_t K, int64_t E, int64_t H, int64_t I) : T(T), K(K), E(E), H(H), I(I) {
    unsigned state = 1;
    auto next = [&] { return (int)((state = state * 1664525u + 1013904223u) >> 9) / 4194304.0f - 1; };
    for (auto *v : {&x, &w, &weights}) v->resize(v == &x ? T * H : v == &w ? E * 3 * H * I : T * K);
    for (auto *v : {&x, &w, &weights}) for (float &f : *v) f = next() / 4;
    for (int64_t p = 0; p < T * K; p++) ids.push_back((int64_t)((next() + 1) / 2 * E) % E);
    for (int64_t e = 0; e < E; e++) {
      const float *at = w.data() + e * 3 * H * I;
      moeopt_expert one{};
      one.w_in[0] = {at, MOEOPT_F32, I, H, H, 1};
      one.w_in[1] = {at + H * I, MOEOPT_F32, I, H, H, 1};
      one.w_out = {at + 2 * H * I, MOEOPT_F32, H, I, I, 1};
      experts.push_back(one), index.push_back(e);
    }
    spec.rows = SEPARATE, spec.activation = SILU;
  }

  // y, and behind it what a backward pass keeps
  std::vector<float> run(int64_t threads) const {
    std::vector<float> y(T * H + T * K * 2 * I);
    moeopt_call c{};
    c.abi = moeopt_abi(), c.spec = &spec, c.T = T, c.K = K, c.E = E, c.H = H, c.D = H;
    c.x = x.data(), c.x_stride[0] = H, c.x_stride[1] = 1;
    c.ids = ids.data(), c.ids_dtype = MOEOPT_I64, c.ids_stride[0] = K, c.ids_stride[1] = 1;
    c.weights = weights.data(), c.weights_stride[0] = K, c.weights_stride[1] = 1;
    c.y = y.data(), c.kept = y.data() + T * H, c.kept_step = 2 * I, c.experts = experts.data(), c.index = index.data(), c.threads = threads, c.isa = moeopt_isas();
    if (moeopt_experts(&c)) fprintf(stderr, "refused\n"), exit(3);
    return y;
  }
};

}  // namespace

int main(int, char **argv) {
  const int rounds = atoi(argv[1]);
  if (!rounds) {
    int shared = 0;
    std::thread other([&] { shared++; });
    shared++;
    return other.join(), shared;
  }
  const Block blocks[] = {{1, 2, 4, 48, 40}, {7, 3, 5, 33, 29}, {40, 2, 6, 64, 96}};
  for (const Block &b : blocks) {
    const std::vector<float> want = b.run(1);
    std::vector<std::thread> callers;
    bool same[3] = {};
    for (int caller = 0; caller < 3; caller++)
      callers.emplace_back([&, caller] {
        bool all = true;
        for (int i = 0; i < rounds; i++) {
          const std::vector<float> got = b.run(2 + (i + caller) % 3);
          all = all && !memcmp(got.data(), want.data(), want.size() * sizeof(float));
        }
        same[caller] = all;
      });
    for (auto &one : callers) one.join();
    for (bool one : same) if (!one) return printf("other bits\n"), 2;
  }
  return puts("same bits"), 0;
}
