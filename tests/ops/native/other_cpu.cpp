// The kernel on a CPU that this machine emulates: calls come laid out in one piece, results go back (other_cpu.py).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "moeopt_experts.h"

static bool get(void *to, int64_t bytes) { return fread(to, 1, bytes, stdin) == (size_t)bytes; }
static void put(const void *from, int64_t bytes) { fwrite(from, 1, bytes, stdout); }

int main() {
  struct { int64_t bytes, pointers, y, y_bytes; } told;
  const int64_t isas = moeopt_isas();
  put(&isas, sizeof isas), fflush(stdout);
  while (get(&told, sizeof told)) {
    std::vector<int64_t> pointers(told.pointers);
    char *at = (char *)aligned_alloc(64, (told.bytes + 63) / 64 * 64);
    if (!at || !get(pointers.data(), told.pointers * 8) || !get(at, told.bytes)) return 1;
    for (const int64_t where : pointers) *(int64_t *)(at + where) += (int64_t)at;
    const int64_t status = moeopt_experts((const moeopt_call *)at);
    put(&status, sizeof status), put(at + told.y, told.y_bytes), fflush(stdout);
    free(at);
  }
  return 0;
}
