// Products of bfloat16 by the tiles of AMX: 16 rows of x times 16 rows of W, 32 numbers of k at a time, in one instruction.
//
// x lies as a tile wants it. W does not: pairs of k have to lie beside those of the next row of W. So strips of 32 rows of W
// are turned into a buffer that stays in the nearest cache, CHUNK numbers of k at a time, while the strip before it is
// multiplied with all rows of x: loads of tiles do not wait for what was stored right before them.
//
// A number of the result is the sum of its row of x and its row of W, 32 products of k added to the sum of those before: by the
// definition of the instruction, first those of even and of odd places by themselves. It is the same whatever else is in a
// tile, so products of any number of rows are made so, and a token's bits depend on no other.
#include <utility>

#include "isa.h"
#include "lanes.h"
#include "tile_unit.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int64_t STEP = 32, SIDE = 16;        // numbers of k of a tile, and its rows, of x or of W
constexpr int64_t STRIP = 2 * SIDE;            // rows of W, and of x, of two tiles beside each other
constexpr int64_t TILE = SIDE * STEP;          // numbers of a tile
constexpr int64_t CHUNK = 256, FEW_ROWS = 64;  // k of a strip; of W with contiguous rows, where few rows of x are multiplied
constexpr int64_t STRIPS_AHEAD = 4;            // from what is turned to what is fetched, of W with contiguous rows
static_assert(4 * CHUNK * STRIP <= TILE_SCRATCH, "two strips fit");

struct alignas(64) Shape {  // of tiles: sums of two by two, two of x, two of W
  uint8_t palette = 1, start = 0, none[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  explicit Shape(int64_t rows_of_x) {
    const int64_t first = rows_of_x < SIDE ? rows_of_x : SIDE;
    const int64_t of[8] = {first, first, rows_of_x - first, rows_of_x - first, first, rows_of_x - first, SIDE, SIDE};
    for (int i = 0; i < 8; i++) rows[i] = (uint8_t)of[i], bytes[i] = of[i] ? 64 : 0;
  }
};
static_assert(sizeof(Shape) == 64, "what the instruction reads");

#if defined(__AVX512BW__)

inline __mmask32 first_of_32(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

// W with contiguous rows of outputs: two rows become pairs, of as many outputs as two tiles have
inline void turn_across(uint16_t *to, const uint16_t *w, int64_t si, int64_t n, int64_t count, int64_t fetched) {
  const __m512i left = pair_order(0), right = pair_order(SIDE);
  const __mmask32 there = first_of_32(n);
  for (int64_t k = 0; k < STEP; k += 2, to += STRIP) {
    __m512i row[2];
    UNROLL for (int i = 0; i < 2; i++) {
      __builtin_prefetch(w + (k + i) * si + fetched, 0, 2);
      row[i] = k + i < count ? _mm512_maskz_loadu_epi16(there, w + (k + i) * si) : _mm512_setzero_si512();
    }
    _mm512_store_si512(to, _mm512_permutex2var_epi16(row[0], left, row[1]));
    _mm512_store_si512(to + TILE, _mm512_permutex2var_epi16(row[0], right, row[1]));
  }
}

// W with contiguous k: 16 rows of 16 pairs become columns, the last one again where there are fewer
inline void turn_along(uint16_t *to, const uint16_t *w, int64_t so, int64_t n, int64_t count, int64_t fetched) {
  const __mmask32 there = first_of_32(count);
  __m512i r[4][4];
  UNROLL for (int i = 0; i < SIDE; i++) {
    const uint16_t *row = w + (i < n ? i : n - 1) * so;
    __builtin_prefetch(row + fetched, 0, 2);
    r[i / 4][i % 4] = _mm512_maskz_loadu_epi16(there, row);
  }
  UNROLL for (int g = 0; g < 4; g++) turn4(r[g]);
  UNROLL for (int i = 0; i < 4; i++) {
    __m512i parts[4] = {r[0][i], r[1][i], r[2][i], r[3][i]};
    turn4_parts(parts);
    UNROLL for (int q = 0; q < 4; q++) _mm512_store_si512(to + (4 * q + i) * STRIP, parts[q]);
  }
}

#endif

// W[j][k] is w[j * so + k * si]: n rows and `count` numbers of k become to[k / 2][row][k % 2] of two tiles, with zeros behind
// the last k. What comes `fetched` numbers behind is fetched meanwhile.
void turn(uint16_t *to, const uint16_t *w, int64_t so, int64_t si, int64_t n, int64_t count, int64_t fetched) {
#if defined(__AVX512BW__)
  if (si != 1) return turn_across(to, w, si, n, count, fetched);
  for (int64_t j = 0; j < n; j += SIDE) turn_along(to + j / SIDE * TILE, w + j * so, so, n - j, count, fetched);
#else  // for tests: a CPU with tiles has AVX-512
  (void)fetched;
  for (int64_t j = 0; j < STRIP; j++)
    for (int64_t k = 0; k < STEP; k++)
      to[j / SIDE * TILE + k / 2 * STRIP + j % SIDE * 2 + k % 2] = j < n && k < count ? w[j * so + k * si] : 0;
#endif
}

// X by W tiles of sums, which are begun or added to; meanwhile(s) is called after each step of k
template <int X, int W, class Meanwhile>
inline void multiply(const uint16_t *x, int64_t ldx, const uint16_t *turned, int64_t steps, float *to, int64_t ldt, bool add,
                     const Meanwhile &meanwhile) {
  const int64_t from_x = ldx * 2, from_sum = ldt * 4;  // bytes
  float *below = to + SIDE * ldt;
  memory_is_as_written(turned);
  if (add) {
    _tile_loadd(0, to, from_sum);
    if constexpr (W > 1) _tile_loadd(1, to + SIDE, from_sum);
    if constexpr (X > 1) _tile_loadd(2, below, from_sum);
    if constexpr (X > 1 && W > 1) _tile_loadd(3, below + SIDE, from_sum);
  } else {
    _tile_zero(0);
    if constexpr (W > 1) _tile_zero(1);
    if constexpr (X > 1) _tile_zero(2);
    if constexpr (X > 1 && W > 1) _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s++, x += STEP, turned += 2 * TILE) {
    _tile_loadd(4, x, from_x);
    _tile_loadd(6, turned, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (X > 1) _tile_loadd(5, x + SIDE * ldx, from_x);
    if constexpr (X > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (W > 1) _tile_loadd(7, turned + TILE, 64);
    if constexpr (W > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (X > 1 && W > 1) _tile_dpbf16ps(3, 5, 7);
    meanwhile(s);
  }
  _tile_stored(0, to, from_sum);
  if constexpr (W > 1) _tile_stored(1, to + SIDE, from_sum);
  if constexpr (X > 1) _tile_stored(2, below, from_sum);
  if constexpr (X > 1 && W > 1) _tile_stored(3, below + SIDE, from_sum);
  memory_is_as_written(to);
}

struct Strip {  // n rows of W from j on, numbers k .. k + count
  int64_t j, k, n, count;
};

struct Product : TileProduct {
  int64_t chunk;
  bool across;  // W has contiguous rows of outputs

  explicit Product(const TileProduct &p) : TileProduct(p), chunk(CHUNK), across(p.so == 1 && p.si != 1) {
    if (across && M <= SIDE) chunk = FEW_ROWS;  // sums are few: W is read in the order in which it lies
  }

  Strip at(int64_t j, int64_t k) const { return {j, k, n - j < STRIP ? n - j : STRIP, K - k < chunk ? K - k : chunk}; }
  Strip after(const Strip &s) const { return s.j + STRIP < n ? at(s.j + STRIP, s.k) : at(0, s.k + chunk); }
  static int64_t steps(const Strip &s) { return (s.count + STEP - 1) / STEP; }

  int64_t fetched(const Strip &s) const {  // from what is turned to what is fetched, in numbers of W
    const int64_t column = s.j + STRIPS_AHEAD * STRIP;
    if (across) return column < n ? column - s.j : chunk * si + column - n - s.j;
    if (s.k + chunk < K) return chunk;
    return STRIP * so - s.k;
  }

  void turn_step(const Strip &s, int64_t step, uint16_t *to) const {
    const int64_t k = s.k + step * STEP;
    turn(to + step * 2 * TILE, w + s.j * so + k * si, so, si, s.n, K - k < STEP ? K - k : STEP, fetched(s));
  }

  // all rows of x; meanwhile `next` is turned, with the first of them
  void rows(const Strip &s, const uint16_t *turned, const Strip &next, uint16_t *next_turned, int64_t &shape) const {
    const int64_t to_come = next.k < K ? steps(next) : 0, own = steps(s);
    for (int64_t m = 0; m < M; m += STRIP) {
      const int64_t count = M - m < STRIP ? M - m : STRIP;
      if (count != shape) {
        const Shape it(count);
        memory_is_as_written(&it);
        _tile_loadconfig(&it);
        shape = count;
      }
      const auto meanwhile = [&](int64_t step) {
        if (m == 0 && step < to_come) turn_step(next, step, next_turned);
      };
      const auto tiles = count > SIDE ? (s.n > SIDE ? multiply<2, 2, decltype(meanwhile)> : multiply<2, 1, decltype(meanwhile)>)
                                      : (s.n > SIDE ? multiply<1, 2, decltype(meanwhile)> : multiply<1, 1, decltype(meanwhile)>);
      tiles(x + m * ldx + s.k, ldx, turned, own, to + m * ldt + s.j, ldt, s.k > 0, meanwhile);
    }
    for (int64_t step = own; step < to_come; step++) turn_step(next, step, next_turned);
  }

  void run() const {
    uint16_t *turned = scratch, *other = scratch + CHUNK * STRIP;
    int64_t shape = 0;  // rows of x that tiles are made for
    Strip strip = at(0, 0);
    for (int64_t step = 0; step < steps(strip); step++) turn_step(strip, step, turned);
    while (strip.k < K) {
      const Strip next = after(strip);
      rows(strip, turned, next, other, shape);
      std::swap(turned, other), strip = next;
    }
    _tile_release();
  }
};

}  // namespace

int64_t tiles_of_this_process() {
  static const TileUse answer = ask_for_tiles();
  return answer;
}

void multiply_by_tiles(const TileProduct &p) { Product(p).run(); }
