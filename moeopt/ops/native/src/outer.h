// Products on W with contiguous rows, (in, out): k by k, the value of x for all lanes, along the outputs of a row of W.
//
// Memory gives long runs faster than short ones far apart. So W is read GROUP rows at a time, each over all columns of the
// task, in the order in which they lie: while one group is multiplied, out of the second-level cache, the next one is
// fetched. One row of x is too little work to hide that: with AVX-512, SIDE rows of W are then read beside each other from
// end to end, which the CPU fetches ahead by itself, and faster than it is told to. A group's sum is made k by k, then added
// to what is there, whatever the number of rows of x.
#pragma once
#include "lanes.h"
#include "tile.h"

namespace {

constexpr int64_t GROUP = 64;
constexpr int SIDE = 16;
constexpr int64_t PANEL_SUMS = GROUP * 256;      // floats that a panel holds
constexpr int NX_OUTER = MANY_REGISTERS ? 12 : 6;  // rows of x of one tile, at most
constexpr int NX_LEAST = MANY_REGISTERS ? 5 : 3;   // and at least, where rows are shared out evenly
constexpr int NV_MANY = 2;                       // vectors of outputs beside that many rows

constexpr int outer_vectors(int NX) {  // as many as leave all sums in registers
  return MANY_REGISTERS ? (NX == 1 ? 16 : NX <= 3 ? 8 : NX <= 6 ? 4 : NV_MANY) : (NX == 1 ? 8 : NX <= 3 ? 4 : NV_MANY);
}

struct Fetch {  // rows of W to come, line by line as they lie
  const char *at, *end;      // the next line, and where its row ends
  int64_t to_next, stride;   // bytes from there to the next row, and from row to row
  int64_t rows;              // that are left

  Fetch(const char *first, int64_t row, int64_t from_row_to_row, int64_t many)
      : at(first), end(first + row), to_next(from_row_to_row - row), stride(from_row_to_row), rows(many) {}

  template <int LINES>
  void some() {
    UNROLL for (int i = 0; i < LINES; i++) __builtin_prefetch(at + i * 64, 0, 2);
    if (rows <= 0) return;
    at += LINES * 64;
    if (at >= end) at = end + to_next, end += stride, rows--;
  }
};

template <int NX, int NV>
inline void add_sums(const V (&acc)[NX][NV], float *to, int64_t ldt, bool add) {
  UNROLL for (int i = 0; i < NX; i++)
    UNROLL for (int j = 0; j < NV; j++) {
      float *at = to + i * ldt + j * L;
      store(at, add ? load(at) + acc[i][j] : acc[i][j]);
    }
}

template <class W>
struct Outer {
  typedef typename W::T T;
  typedef float X;
  typedef Outer<F32> Beside;
  static constexpr int64_t direct = sizeof(T) == 2 ? NX_LEAST - 1 : VBYTES == 64 ? INT64_MAX : NX_OUTER;  // see outer_direct

  // n rows of W, NX rows of x, NV vectors of outputs
  template <int NX, int NV>
  static void tile(const T *w, int64_t si, const float *x, int64_t ldx, int64_t n, float *to, int64_t ldt, bool add, Fetch &fetch) {
    V acc[NX][NV];
    UNROLL for (int i = 0; i < NX; i++)
      UNROLL for (int j = 0; j < NV; j++) acc[i][j] = V{};
    Fetch ahead = fetch;
    for (int64_t k = 0; k < n; k++, w += si) {
      ahead.some<(NV * L * (int)sizeof(T) + 63) / 64>();
      if (NX <= NV) {
        V b[NX];
        UNROLL for (int i = 0; i < NX; i++) b[i] = splat(x[i * ldx + k]);
        UNROLL for (int j = 0; j < NV; j++) {
          const V a = W::ld(w + j * L);
          UNROLL for (int i = 0; i < NX; i++) acc[i][j] += a * b[i];
        }
      } else {
        V a[NV];
        UNROLL for (int j = 0; j < NV; j++) a[j] = W::ld(w + j * L);
        UNROLL for (int i = 0; i < NX; i++) {
          const V b = splat(x[i * ldx + k]);
          UNROLL for (int j = 0; j < NV; j++) acc[i][j] += a[j] * b;
        }
      }
    }
    fetch = ahead;
    add_sums(acc, to, ldt, add);
  }

  // NR rows of W, one row of x: added to `sums`, or beginning them
  static constexpr int LEAST = 1;
  static constexpr bool streams = VBYTES == 64 && sizeof(T) == 4;
  template <int NR>
  static void stream(const T *w, int64_t si, const float *x, int64_t, int64_t columns, float *sums, bool begin) {
    for (int64_t j = 0; j < columns; j += L) {
      V s = begin ? V{} : load(sums + j);
      UNROLL for (int r = 0; r < NR; r++) s += W::ld(w + r * si + j) * splat(x[r]);
      store(sums + j, s);
    }
  }

  static void copy(float *to, const T *w) {
    UNROLL for (int j = 0; j < NV_MANY; j++) store(to + j * L, W::ld(w + j * L));
  }
  static void copy(float *to, const T *w, int64_t n) { load_row(to, w, W::dtype, 1, n); }
};

#if defined(__AVX512BF16__)
// both factors bfloat16: the rows of k and k + 1 become pairs in registers, whose products one instruction adds
struct OuterPairs {
  typedef uint16_t T, X;
  typedef OuterPairs Beside;
  static constexpr int64_t direct = INT64_MAX;

  template <int NX, int NV>
  static void tile(const uint16_t *w, int64_t si, const uint16_t *x, int64_t ldx, int64_t n, float *to, int64_t ldt, bool add, Fetch &fetch) {
    const __m512i first = pair_order(0), second = pair_order(16);
    V acc[NX][NV];
    UNROLL for (int i = 0; i < NX; i++)
      UNROLL for (int j = 0; j < NV; j++) acc[i][j] = V{};
    Fetch ahead = fetch;
    for (int64_t k = 0; k < n; k += 2, w += 2 * si) {
      ahead.some<NV>();
      UNROLL for (int p = 0; p < NV / 2; p++) {
        const __m512i even = _mm512_loadu_si512(w + 32 * p);
        const __m512i odd = k + 1 < n ? _mm512_loadu_si512(w + si + 32 * p) : _mm512_setzero_si512();
        const __m512bh a = (__m512bh)_mm512_permutex2var_epi16(even, first, odd), c = (__m512bh)_mm512_permutex2var_epi16(even, second, odd);
        UNROLL for (int i = 0; i < NX; i++) {
          int32_t pair;
          memcpy(&pair, x + i * ldx + k, 4);
          const __m512bh b = (__m512bh)_mm512_set1_epi32(pair);
          acc[i][2 * p] = (V)_mm512_dpbf16_ps((__m512)acc[i][2 * p], a, b);
          acc[i][2 * p + 1] = (V)_mm512_dpbf16_ps((__m512)acc[i][2 * p + 1], c, b);
        }
      }
    }
    fetch = ahead;
    add_sums(acc, to, ldt, add);
  }

  static constexpr int LEAST = 2;
  static constexpr bool streams = true;
  template <int NR>
  static void stream(const uint16_t *w, int64_t si, const uint16_t *x, int64_t n, int64_t columns, float *sums, bool begin) {
    const __m512i first = pair_order(0), second = pair_order(16);
    for (int64_t j = 0; j < columns; j += 2 * L) {
      V s = begin ? V{} : load(sums + j), t = begin ? V{} : load(sums + j + L);
      UNROLL for (int r = 0; r < NR; r += 2) {
        const __m512i even = _mm512_loadu_si512(w + r * si + j);
        const __m512i odd = r + 1 < n ? _mm512_loadu_si512(w + (r + 1) * si + j) : _mm512_setzero_si512();
        int32_t pair;
        memcpy(&pair, x + r, 4);
        const __m512bh b = (__m512bh)_mm512_set1_epi32(pair);
        s = (V)_mm512_dpbf16_ps((__m512)s, (__m512bh)_mm512_permutex2var_epi16(even, first, odd), b);
        t = (V)_mm512_dpbf16_ps((__m512)t, (__m512bh)_mm512_permutex2var_epi16(even, second, odd), b);
      }
      store(sums + j, s), store(sums + j + L, t);
    }
  }

  static void copy(uint16_t *to, const uint16_t *w) { memcpy(to, w, NV_MANY * L * 2); }
  static void copy(uint16_t *to, const uint16_t *w, int64_t n) { memcpy(to, w, n * 2); }
};
#endif

template <int LEAST, int NX, class Tile>
void in_rows(int64_t M, const Tile &tile) {  // tile(Number<M>()), with LEAST <= M <= NX
  if constexpr (NX > LEAST)
    if (M < NX) return in_rows<LEAST, NX - 1>(M, tile);
  tile(Number<NX>());
}

// `width` columns of a group, of which n are there, beside zeros: one row right behind the other.
template <class Kind>
const typename Kind::Beside::T *beside(const typename Kind::T *w, int64_t si, int64_t n, int64_t width, int64_t kc, float *panel) {
  typedef typename Kind::Beside::T T;
  T *to = (T *)panel;
  if (n >= width && width == NV_MANY * L) {
    for (int64_t k = 0; k < kc; k++, w += si, to += NV_MANY * L) Kind::copy(to, w);
    return (const T *)panel;
  }
  for (int64_t k = 0; k < kc; k++, w += si, to += width) {
    Kind::copy(to, w, smaller(n, width));
    for (int64_t i = n; i < width; i++) to[i] = 0;
  }
  return (const T *)panel;
}

// One row of x: as many of the n columns as are whole vectors; returns how many. `panel` holds a group's sums.
template <class Kind>
int64_t outer_streamed(const View &v, int64_t first, int64_t n, const typename Kind::X *x, int64_t K, float *to, float *panel) {
  const int64_t columns = n / (Kind::LEAST * L) * Kind::LEAST * L;
  for (int64_t k = 0; k < K; k += GROUP) {
    const int64_t kc = smaller(GROUP, K - k);
    const auto *w = (const typename Kind::T *)v.data + k * v.si + first;
    float *sums = k ? panel : to;
    int64_t r = 0;
    for (; r + SIDE <= kc; r += SIDE) Kind::template stream<SIDE>(w + r * v.si, v.si, x + k + r, SIDE, columns, sums, r == 0);
    for (; r < kc; r += Kind::LEAST) Kind::template stream<Kind::LEAST>(w + r * v.si, v.si, x + k + r, kc - r, columns, sums, r == 0);
    if (k)
      for (int64_t j = 0; j < columns; j += L) store(to + j, load(to + j) + load(sums + j));
  }
  return columns;
}

// Up to `direct` rows of x, tiles are read where W lies. Beyond, a tile is copied once for all of them: to widen it, and since
// its rows are a power of two apart more often than not, and fall on a few sets of the first-level cache (measured: of 12
// rows and two whole lines a tile, as with AVX-512, that does not count). Shares of rows are even, so that none is small. The
// columns of `to` behind n are garbage, up to the width of a tile.
template <class Kind>
void outer_direct(const View &v, int64_t first, int64_t n, const typename Kind::X *x, int64_t ldx, int64_t K, int64_t M, float *to,
                  int64_t ldt, float *panel) {
  typedef typename Kind::T T;
  typedef typename Kind::Beside Beside;
  if constexpr (Kind::streams)
    if (M == 1 && n <= PANEL_SUMS) {
      const int64_t done = outer_streamed<Kind>(v, first, n, x, K, to, panel);
      if (done == n) return;
      first += done, n -= done, to += done;
    }
  const int64_t row = n * sizeof(T), stride = v.si * sizeof(T), parts = (M + NX_OUTER - 1) / NX_OUTER;
  Fetch fetch((const char *)v.data + first * sizeof(T), row, stride, smaller(GROUP, K));
  while (fetch.rows > 0) fetch.some<4>();
  for (int64_t k = 0; k < K; k += GROUP) {
    const int64_t kc = smaller(GROUP, K - k);
    const bool add = k > 0;
    const T *w = (const T *)v.data + k * v.si + first;
    fetch = Fetch((const char *)(w + GROUP * v.si), row, stride, smaller(GROUP, K - k - GROUP));
    if (M <= Kind::direct) {
      for (int64_t m = 0, part = parts, share; part > 0; part--, m += share) {
        share = (M - m + part - 1) / part;
        in_rows<1, Kind::direct < NX_OUTER ? Kind::direct : NX_OUTER>(share, [&](auto rows) {
          constexpr int NX = decltype(rows)::value, NV = outer_vectors(NX);
          const typename Kind::X *xm = x + m * ldx + k;
          float *tm = to + m * ldt;
          int64_t j = 0;
          for (; j + NV * L <= n; j += NV * L) Kind::template tile<NX, NV>(w + j, v.si, xm, ldx, kc, tm + j, ldt, add, fetch);
          if (j == n) return;
          const auto *wj = beside<Kind>(w + j, v.si, n - j, NV * L, kc, panel);
          Beside::template tile<NX, NV>(wj, NV * L, xm, ldx, kc, tm + j, ldt, add, fetch);
        });
      }
      continue;
    }
    if constexpr (Kind::direct <= NX_OUTER)
    for (int64_t j = 0; j < n; j += NV_MANY * L) {
      const auto *wj = beside<Kind>(w + j, v.si, n - j, NV_MANY * L, kc, panel);
      for (int64_t m = 0, part = parts, share; part > 0; part--, m += share) {
        share = (M - m + part - 1) / part;
        in_rows<NX_LEAST, NX_OUTER>(share, [&](auto rows) {
          Beside::template tile<decltype(rows)::value, NV_MANY>(wj, NV_MANY * L, x + m * ldx + k, ldx, kc, to + m * ldt + j, ldt, add, fetch);
        });
      }
    }
  }
}

}  // namespace
