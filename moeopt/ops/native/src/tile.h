// Products of a few rows of W with many rows of x, on weights as they lie; both orientations, widened on the way.
//
//   to[m * ldt + j] = sum over k of  W[first + j][k] * x[m * ldx + k]          j < n, m < M
//
// A sum is made in one order whatever M, n and the tile are: lanes over k, chunk by chunk (W with contiguous k), or k by k
// (W with contiguous rows). So a token's bits depend on no other token.
#pragma once
#include "vec.h"

namespace {

struct View {  // W[o][i] = data + o * so + i * si; exact: its values are of the compute dtype, or it is float32
  const void *data;
  int64_t dtype, so, si;
  bool exact;
  const void *scales;  // of codes: see codes.h
  int64_t scale_dtype, ss, block;
  bool evens;  // x has the even numbers of each 32 first: see Job
  bool rounds;  // x was rounded to 8 bits: see rounded.h
  const void *zeros;
  int64_t zs;
  MultiplyByTiles tiles;  // see Job
  bool by_lane;  // so lies x: see Rows
};

constexpr int64_t DOT_CHUNK = 1024, PAIR_CHUNK = 2048;
constexpr int NX_DOT = MANY_REGISTERS ? 6 : 3;

template <int N>
struct Number { static constexpr int value = N; };

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t chunk_of(int64_t K, int64_t most) {  // equal chunks, whole cache lines
  const int64_t count = (K + most - 1) / most;
  return up_to((K + count - 1) / count, 64);
}

struct F32 { typedef float T; static V ld(const T *p) { return load(p); } static constexpr int64_t dtype = MOEOPT_F32; };
struct BF16 {
  typedef uint16_t T;
  static V ld(const T *p) { VH h; memcpy(&h, p, sizeof h); return widen_bf16(h); }
  static constexpr int64_t dtype = MOEOPT_BF16;
};
struct F16 {
  typedef uint16_t T;
  static V ld(const T *p) { VH h; memcpy(&h, p, sizeof h); return widen_f16(h); }
  static constexpr int64_t dtype = MOEOPT_F16;
};

template <int NW>
inline void finish(const V (&acc)[NW], float *to, bool add) {
  UNROLL for (int j = 0; j < NW; j += 4) sum4(acc[j], acc[j + 1], acc[j + 2], acc[j + 3], to + j, add);
}

// FETCH rows of W that come next are fetched into the second-level cache meanwhile: a row ends where the processor's own
// prefetching would have to begin anew. All NW of them are `ahead` elements behind these; fewer are those of `next`.
template <class W, int NW, int NX, int FETCH>
inline void dot(const typename W::T *const *w, int64_t ahead, const typename W::T *const *next, const float *x, int64_t ldx,
                int64_t n, float *to, int64_t ldt, bool add) {
  V acc[NX][NW];
  UNROLL for (int i = 0; i < NX; i++)
    UNROLL for (int j = 0; j < NW; j++) acc[i][j] = V{};
  const typename W::T *wp[NW];
  UNROLL for (int j = 0; j < NW; j++) wp[j] = w[j];
  const typename W::T *np[FETCH + 1];
  UNROLL for (int j = 0; j < FETCH; j++) np[j] = FETCH == NW ? nullptr : next[j];
  int64_t k = 0;
  for (; k + L <= n; k += L) {
    UNROLL for (int j = 0; j < FETCH; j++) __builtin_prefetch((FETCH == NW ? wp[j] + ahead : np[j]) + k, 0, 2);
    if (NX <= NW) {
      V b[NX];
      UNROLL for (int i = 0; i < NX; i++) b[i] = load(x + i * ldx + k);
      UNROLL for (int j = 0; j < NW; j++) {
        const V a = W::ld(wp[j] + k);
        UNROLL for (int i = 0; i < NX; i++) acc[i][j] += a * b[i];
      }
    } else {
      V a[NW];
      UNROLL for (int j = 0; j < NW; j++) a[j] = W::ld(wp[j] + k);
      UNROLL for (int i = 0; i < NX; i++) {
        const V b = load(x + i * ldx + k);
        UNROLL for (int j = 0; j < NW; j++) acc[i][j] += a[j] * b;
      }
    }
  }
  if (k < n) {
    UNROLL for (int j = 0; j < NW; j++) {
      const V a = load_some(wp[j], W::dtype, k, n - k);
      UNROLL for (int i = 0; i < NX; i++) acc[i][j] += a * load(x + i * ldx + k);  // x has zeros behind its end
    }
  }
  UNROLL for (int i = 0; i < NX; i++) finish(acc[i], to + i * ldt, add);
}

template <class W, int NW, int FETCH>
int64_t dot_some(const typename W::T *const *w, int64_t ahead, const typename W::T *const *next, const float *x, int64_t ldx,
                 int64_t n, int64_t M, float *to, int64_t ldt, bool add) {
  switch (smaller(M, NX_DOT)) {  // the rows that were done
    case 6: dot<W, NW, NX_DOT < 6 ? 1 : 6, FETCH>(w, ahead, next, x, ldx, n, to, ldt, add); return 6;
    case 5: dot<W, NW, NX_DOT < 6 ? 1 : 5, FETCH>(w, ahead, next, x, ldx, n, to, ldt, add); return 5;
    case 4: dot<W, NW, NX_DOT < 6 ? 1 : 4, FETCH>(w, ahead, next, x, ldx, n, to, ldt, add); return 4;
    case 3: dot<W, NW, 3, FETCH>(w, ahead, next, x, ldx, n, to, ldt, add); return 3;
    case 2: dot<W, NW, 2, FETCH>(w, ahead, next, x, ldx, n, to, ldt, add); return 2;
    default: dot<W, NW, 1, FETCH>(w, ahead, next, x, ldx, n, to, ldt, add); return 1;
  }
}

// All rows of x, a tile at a time; the four rows of W that come next are fetched during the first tiles, spread over them.
template <class Tile, class T>
void in_tiles(const T *const *w, int64_t ahead, int64_t M, int64_t most, const Tile &tile) {
  const T *next[4];
  for (int i = 0; i < 4; i++) next[i] = w[i] + ahead;
  const int64_t tiles = (M + most - 1) / most;
  int64_t fetched = ahead ? 0 : 4, done = 0;
  for (int64_t t = 0; done < M; t++) {
    const int64_t left = tiles - t, share = left >= 4 - fetched ? 1 : left == 1 ? 4 - fetched : 2;
    if (fetched == 4) done += tile(Number<0>(), next, done);
    else if (share == 1 || fetched == 3) done += tile(Number<1>(), next + fetched, done), fetched += 1;
    else if (share == 4) done += tile(Number<4>(), next, done), fetched = 4;
    else done += tile(Number<2>(), next + fetched, done), fetched += 2;
  }
}

template <class W, int NW>
void dot_rows(const typename W::T *const *w, int64_t ahead, const float *x, int64_t ldx, int64_t n, int64_t M, float *to, int64_t ldt, bool add) {
  in_tiles(w, ahead, M, NX_DOT, [&](auto fetch, const typename W::T *const *next, int64_t m) {
    return dot_some<W, NW, decltype(fetch)::value>(w, ahead, next, x + m * ldx, ldx, n, M - m, to + m * ldt, ldt, add);
  });
}

// rows j .. j + NW of W, the last one again where there are fewer; the columns of `to` behind n are garbage
template <class T, int NW>
inline void row_pointers(const View &W, int64_t first, int64_t j, int64_t n, int64_t k, const T **w) {
  UNROLL for (int i = 0; i < NW; i++) w[i] = (const T *)W.data + (first + smaller(j + i, n - 1)) * W.so + k;
}

template <class W>
void dot_direct(const View &v, int64_t first, int64_t n, const float *x, int64_t ldx, int64_t K, int64_t M, float *to, int64_t ldt) {
  const int64_t chunk = chunk_of(K, DOT_CHUNK);
  const typename W::T *w[8];
  for (int64_t k = 0; k < K; k += chunk) {
    const int64_t kc = smaller(chunk, K - k);
    for (int64_t j = 0; j < n;) {
      const int NW = M == 1 && j + 8 <= n ? 8 : 4;
      const int64_t ahead = j + NW < n || k + chunk >= K ? NW * v.so : chunk - j * v.so;
      if (NW == 8) {
        row_pointers<typename W::T, 8>(v, first, j, n, k, w);
        dot<W, 8, 1, 8>(w, ahead, nullptr, x + k, ldx, kc, to + j, ldt, k > 0);
      } else {
        row_pointers<typename W::T, 4>(v, first, j, n, k, w);
        dot_rows<W, 4>(w, ahead, x + k, ldx, kc, M, to + j, ldt, k > 0);
      }
      j += NW;
    }
  }
}

// four rows of W at a time, widened or gathered once for all rows of x
void dot_panel(const View &v, int64_t compute, int64_t first, int64_t n, const float *x, int64_t ldx, int64_t K, int64_t M,
               float *to, int64_t ldt, float *panel) {
  const int64_t chunk = chunk_of(K, DOT_CHUNK), size = v.dtype == MOEOPT_F32 ? 4 : 2, ld = chunk + 16;
  const float *w[4] = {panel, panel + ld, panel + 2 * ld, panel + 3 * ld};
  for (int64_t k = 0; k < K; k += chunk) {
    const int64_t kc = smaller(chunk, K - k);
    for (int64_t j = 0; j < n; j += 4) {
      for (int i = 0; i < 4; i++) {
        const char *row = (const char *)v.data + ((first + smaller(j + i, n - 1)) * v.so + k * v.si) * size;
        float *to_row = panel + i * ld;
        if (v.si == 1)
          for (int64_t c = 0; c < kc * size; c += 64) __builtin_prefetch(row + 4 * v.so * size + c, 0, 2);
        load_row(to_row, row, v.dtype, v.si, kc);
        if (!v.exact)
          for (int64_t c = 0; c < kc; c += L) store(to_row + c, round_to(load(to_row + c), compute));
      }
      dot_rows<F32, 4>(w, 0, x + k, ldx, kc, M, to + j, ldt, k > 0);
    }
  }
}

}  // namespace
