// The tiles of AMX in plain C++, as Intel's manual defines them, for CPUs that have none. What a CPU answers with a fault ends
// the process with a word here. Included by the kernel's own header in the place of the real instructions.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>  // has the real ones, as functions or macros
#endif

namespace {

inline void memory_is_as_written(const void *) {}
TileUse ask_for_tiles() { return TILES_MAY_BE_USED; }

struct Unit {
  bool made = false;
  int rows[8] = {}, bytes[8] = {};
  alignas(64) uint8_t data[8][16][64] = {};
};
thread_local Unit unit;

inline void must(bool is, const char *what) {
  if (is) return;
  fprintf(stderr, "tile unit: %s\n", what);
  abort();
}

inline void release() { unit = Unit(); }

inline void take_shape(const void *config) {
  const uint8_t *at = (const uint8_t *)config;
  release();
  must(at[0] == 1 && at[1] == 0, "the palette is 1, and no row was begun");
  for (int i = 2; i < 16; i++) must(at[i] == 0, "reserved bytes are 0");
  for (int i = 0; i < 16; i++) {
    uint16_t bytes;
    memcpy(&bytes, at + 16 + 2 * i, 2);
    const int rows = at[48 + i];
    must(rows <= 16 && bytes <= 64 && !rows == !bytes && (i < 8 || !rows), "a tile has at most 16 rows of 64 bytes, and there are eight");
    if (i < 8) unit.rows[i] = rows, unit.bytes[i] = bytes;
  }
  unit.made = true;
}

inline void must_be_made(int tile) { must(unit.made && unit.rows[tile], "the tile has a shape"); }

inline void zero(int tile) {
  must_be_made(tile);
  memset(unit.data[tile], 0, sizeof unit.data[tile]);
}

inline void load_tile(int tile, const void *from, int64_t step) {
  zero(tile);
  for (int r = 0; r < unit.rows[tile]; r++) memcpy(unit.data[tile][r], (const char *)from + r * step, unit.bytes[tile]);
}

inline void store_tile(int tile, void *to, int64_t step) {
  must_be_made(tile);
  for (int r = 0; r < unit.rows[tile]; r++) memcpy((char *)to + r * step, unit.data[tile][r], unit.bytes[tile]);
}

inline float without_subnormal(float a) { return fabsf(a) < 0x1p-126f ? copysignf(0.f, a) : a; }

inline float widened(const uint8_t *at) {
  uint16_t h;
  memcpy(&h, at, 2);
  const uint32_t bits = (uint32_t)h << 16;
  float a;
  memcpy(&a, &bits, 4);
  return without_subnormal(a);
}

// sums += a times b: of each row, products of even and of odd places are summed apart, each by one rounding of a multiply-add, and
// the two sums are added to each other, then to what was there
inline void add_products(int sums, int a, int b) {
  for (int tile : {sums, a, b}) must_be_made(tile);
  must(sums != a && sums != b && a != b, "three tiles are three");
  must(unit.rows[sums] == unit.rows[a] && unit.bytes[a] / 4 == unit.rows[b] && unit.bytes[b] == unit.bytes[sums], "their shapes fit");
  const int pairs = unit.bytes[a] / 4, columns = unit.bytes[sums] / 4;
  float right[16][2][16] = {};
  for (int k = 0; k < pairs; k++)
    for (int n = 0; n < columns; n++)
      for (int odd = 0; odd < 2; odd++) right[k][odd][n] = widened(unit.data[b][k] + 4 * n + 2 * odd);
  for (int m = 0; m < unit.rows[sums]; m++) {
    float apart[2][16] = {}, whole[16];
    for (int k = 0; k < pairs; k++)
      for (int odd = 0; odd < 2; odd++) {
        const float left = widened(unit.data[a][m] + 4 * k + 2 * odd);
        for (int n = 0; n < 16; n++) apart[odd][n] = without_subnormal(fmaf(left, right[k][odd][n], apart[odd][n]));
      }
    memcpy(whole, unit.data[sums][m], sizeof whole);
    for (int n = 0; n < columns; n++)
      whole[n] = without_subnormal(without_subnormal(whole[n]) + without_subnormal(apart[0][n] + apart[1][n]));
    memcpy(unit.data[sums][m], whole, 4 * columns);
  }
}

}  // namespace

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig take_shape
#define _tile_release release
#define _tile_zero zero
#define _tile_loadd load_tile
#define _tile_stored store_tile
#define _tile_dpbf16ps add_products

// Whether this thread's tiles have a shape: a CPU would keep their 8 KiB at each change of threads.
extern "C" MOEOPT_API int64_t tiles_are_in_use() { return unit.made; }
