// Products on W with contiguous k for many rows of x, (out, in): W is turned once for all of them, then multiplied k by k, to
// the bits of dot products.
//
// A dot product (tile.h, pairs.h) has a sum in each lane, of every 16th number, and adds the lanes at its end. It reads every
// row of x again for each four rows of W, and many rows of x lie in the second-level cache. Here the columns of a tile are
// outputs, and a tile is done lane by lane: first all numbers that lane 0 of a dot product would sum, and so on; the sums of
// the lanes are then added in the same tree. So a row has the same bits both ways, and how many rows there are may choose.
// Rows of x lie by lane, each chunk for itself: what one lane sums stands together.
#pragma once
#include "lanes.h"
#include "outer.h"

namespace {

constexpr int DOT_LANES = 16;  // of a dot product

struct LaneOrder {  // how a row of K units lies: numbers of float32, or pairs of bfloat16
  int64_t units, chunk;

  LaneOrder(int64_t K, bool half)
      : units(up_to(half ? (K + 1) / 2 : K, DOT_LANES)), chunk(half ? chunk_of(K, PAIR_CHUNK) / 2 : chunk_of(K, DOT_CHUNK)) {}

  int64_t each(int64_t begin) const { return smaller(chunk, units - begin) / DOT_LANES; }  // units of a lane in the chunk from there
};

// Numbers i .. i + L of a row of K, i a multiple of L; of zeros behind K there are as many as fill the lanes.
inline void store_by_lane(void *row, bool half, int64_t K, int64_t i, V v) {
  const LaneOrder order(K, half);
  const int64_t unit = half ? i / 2 : i;
  if (unit >= order.units) return;
  const int64_t begin = unit / order.chunk * order.chunk, each = order.each(begin), k = unit - begin;
  uint32_t own[L];
  if (half) {
    uint16_t narrow[L];
    store_as(narrow, MOEOPT_BF16, 0, v);
    memcpy(own, narrow, sizeof narrow);
  } else {
    memcpy(own, &v, sizeof v);
  }
  uint32_t *to = (uint32_t *)row + begin + k % DOT_LANES * each + k / DOT_LANES;
  for (int64_t j = 0; j < (half ? L / 2 : L); j++) to[j * each] = own[j];
}

#if defined(__AVX512F__)

constexpr int LANE_COLUMNS = NV_MANY * L;                    // of a tile and of a task
// Of a chunk of W what one lane sums is one run; runs begin two cache lines apart from a power of two, which would be one set.
constexpr int64_t lane_run(int64_t each) { return (each + 1) * LANE_COLUMNS; }
constexpr int64_t LANE_PANEL = DOT_LANES * lane_run(DOT_CHUNK / DOT_LANES);
constexpr int LANE_SHARE = 6;  // rows of x of one tile, at least: of LANE_ROWS or more, in even shares of NX_OUTER at most
static_assert(LANE_ROWS == NX_OUTER + 1, "two tiles or more, and 13 rows are 7 and 6; no other number has a smaller share");
static_assert(LANE_COLUMNS == LANE_TASK && 2 * DOT_CHUNK == PAIR_CHUNK, "a chunk has as many pairs as numbers");
constexpr int TREE[DOT_LANES] = {0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15};  // lanes as `sum4` adds them up

template <class W>
struct LaneNumbers {  // of any float dtype, widened exactly
  typedef typename W::T T;
  static constexpr int64_t unit = 1;
  static __m512i some(const T *w, int64_t n) {
    return (__m512i)(n >= DOT_LANES ? W::ld(w) : n <= 0 ? V{} : load_some(w, W::dtype, 0, n));
  }
  static V add_product(V sum, V a, const uint32_t *x) {
    float b;
    memcpy(&b, x, 4);
    return sum + a * splat(b);
  }
};

#if defined(__AVX512BF16__)
struct LanePairs {  // of bfloat16
  typedef uint16_t T;
  static constexpr int64_t unit = 2;
  static __m512i some(const uint16_t *w, int64_t n) {
    if (n >= 2 * DOT_LANES) return _mm512_loadu_si512(w);
    return n <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16((1u << n) - 1, w);
  }
  static V add_product(V sum, V a, const uint32_t *x) {
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32((int32_t)*x));
  }
};
#endif

// 16 rows of W to columns: unit k of row c goes to to[k * run + c]
template <class Kind>
inline void turn_to_lanes(const typename Kind::T *const *rows, int64_t k, int64_t n, uint32_t *to, int64_t run) {
  __m512i r[4][4];
  UNROLL for (int i = 0; i < 4; i++)
    UNROLL for (int j = 0; j < 4; j++) r[i][j] = Kind::some(rows[4 * i + j] + k, n);
  UNROLL for (int i = 0; i < 4; i++) turn4(r[i]);
  UNROLL for (int j = 0; j < 4; j++) {
    __m512i c[4] = {r[0][j], r[1][j], r[2][j], r[3][j]};
    turn4_parts(c);
    UNROLL for (int q = 0; q < 4; q++) _mm512_storeu_si512(to + (4 * q + j) * run, c[q]);
  }
}

// `each` units of every lane of NX rows of x, and of the turned W
template <class Kind, int NX>
void lane_tile(const uint32_t *panel, const uint32_t *x, int64_t ldx, int64_t each, float *to, int64_t ldt, bool add, Fetch &fetch) {
  V waiting[4][NX][NV_MANY];  // sums of one, two, four and eight lanes that wait for as many others
  Fetch ahead = fetch;
  for (int p = 0; p < DOT_LANES; p++) {
    const uint32_t *w = panel + TREE[p] * lane_run(each), *xl = x + TREE[p] * each;
    V sums[NX][NV_MANY];
    UNROLL for (int i = 0; i < NX; i++)
      UNROLL for (int j = 0; j < NV_MANY; j++) sums[i][j] = V{};
    for (int64_t q = 0; q < each; q++, w += LANE_COLUMNS) {
      ahead.some<1>();  // two tiles fetch all that comes: at two lines a step memory falls behind, and stops the processor
      V a[NV_MANY];
      UNROLL for (int j = 0; j < NV_MANY; j++) a[j] = load((const float *)w + j * L);
      UNROLL for (int i = 0; i < NX; i++)
        UNROLL for (int j = 0; j < NV_MANY; j++) sums[i][j] = Kind::add_product(sums[i][j], a[j], xl + i * ldx + q);
    }
    int level = 0;
    for (; p >> level & 1; level++)
      UNROLL for (int i = 0; i < NX; i++)
        UNROLL for (int j = 0; j < NV_MANY; j++) sums[i][j] = waiting[level][i][j] + sums[i][j];
    if (p == DOT_LANES - 1) add_sums(sums, to, ldt, add);
    else memcpy(waiting[level], sums, sizeof sums);
  }
  fetch = ahead;
}

// W: rows of one dtype with contiguous k; x lies by lane. The columns of `to` behind n are garbage, up to the width of a tile.
template <class Kind>
void lane_product(const View &v, int64_t first, int64_t n, const uint32_t *x, int64_t ldx, int64_t K, int64_t M, float *to, int64_t ldt,
                  float *panel) {
  typedef typename Kind::T T;
  const LaneOrder order(K, Kind::unit == 2);
  const int64_t parts = (M + NX_OUTER - 1) / NX_OUTER;
  uint32_t *turned = (uint32_t *)panel;
  for (int64_t j = 0; j < n; j += LANE_COLUMNS) {
    const T *rows[LANE_COLUMNS];
    for (int64_t c = 0; c < LANE_COLUMNS; c++) rows[c] = (const T *)v.data + (first + smaller(j + c, n - 1)) * v.so;
    for (int64_t begin = 0; begin < order.units; begin += order.chunk) {
      const int64_t each = order.each(begin), from = begin * Kind::unit, to_come = from + each * DOT_LANES * Kind::unit;
      for (int64_t q = 0; q < each; q++)
        for (int c = 0; c < LANE_COLUMNS; c += DOT_LANES)
          turn_to_lanes<Kind>(rows + c, from + q * DOT_LANES * Kind::unit, K - from - q * DOT_LANES * Kind::unit,
                              turned + q * LANE_COLUMNS + c, lane_run(each));
      const bool more = to_come < K;
      const int64_t next = more ? smaller(order.chunk * Kind::unit, K - to_come) : smaller(order.chunk * Kind::unit, K);
      Fetch fetch((const char *)(more ? rows[0] + to_come : rows[0] + LANE_COLUMNS * v.so), next * (int64_t)sizeof(T), v.so * (int64_t)sizeof(T),
                  LANE_COLUMNS);
      for (int64_t m = 0, part = parts, share; part > 0; part--, m += share) {
        share = (M - m + part - 1) / part;
        in_rows<LANE_SHARE, NX_OUTER>(share, [&](auto many) {
          lane_tile<Kind, decltype(many)::value>(turned, x + m * ldx + begin, ldx, each, to + m * ldt + j, ldt, begin > 0, fetch);
        });
      }
    }
  }
}

#endif

}  // namespace
