// Products on W with contiguous k where k is short, (out, in): W is turned once, then k by k, as in outer.h.
//
// A sum of the lanes of each accumulator, which dot products end with, costs as much as the product itself where k is a few
// vectors long. How long k is decides, and nothing else: a token's bits depend on no other token.
#pragma once
#include "outer.h"

namespace {

constexpr int TURNED_WIDE = NV_MANY * L;  // columns of a tile

// rows c .. c + 4 of W to columns: to[k * TURNED_WIDE + c]
inline void turn4(const float *const *row, int64_t K, float *to) {
  int64_t k = 0;
#if defined(__AVX2__)
  for (; k + 4 <= K; k += 4) {
    __m128 a = _mm_loadu_ps(row[0] + k), b = _mm_loadu_ps(row[1] + k), c = _mm_loadu_ps(row[2] + k), d = _mm_loadu_ps(row[3] + k);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    float *at = to + k * TURNED_WIDE;
    _mm_storeu_ps(at, a), _mm_storeu_ps(at + TURNED_WIDE, b), _mm_storeu_ps(at + 2 * TURNED_WIDE, c), _mm_storeu_ps(at + 3 * TURNED_WIDE, d);
  }
#endif
  for (; k < K; k++)
    for (int i = 0; i < 4; i++) to[k * TURNED_WIDE + i] = row[i][k];
}

// W: rows of any float dtype, exact, with contiguous k, K <= TURNED
void outer_turned(const View &v, int64_t first, int64_t n, const float *x, int64_t ldx, int64_t K, int64_t M, float *to, int64_t ldt,
                  float *panel) {
  const int64_t size = v.dtype == MOEOPT_F32 ? 4 : 2, parts = (M + NX_OUTER - 1) / NX_OUTER;
  float *widened = panel + TURNED * TURNED_WIDE;
  Fetch none((const char *)panel, 0, 0, 0);
  for (int64_t j = 0; j < n; j += TURNED_WIDE) {
    for (int64_t c = 0; c < TURNED_WIDE; c += 4) {
      const float *row[4];
      for (int i = 0; i < 4; i++) {  // the last one again where there are fewer; the columns of `to` behind n are garbage
        const char *w = (const char *)v.data + (first + smaller(j + c + i, n - 1)) * v.so * size;
        if (size == 2) load_row(widened + i * TURNED, w, v.dtype, 1, K);
        row[i] = size == 2 ? widened + i * TURNED : (const float *)w;
      }
      turn4(row, K, panel + c);
    }
    for (int64_t m = 0, part = parts, share; part > 0; part--, m += share) {
      share = (M - m + part - 1) / part;
      in_rows<1, NX_OUTER>(share, [&](auto rows) {
        Outer<F32>::tile<decltype(rows)::value, NV_MANY>(panel, TURNED_WIDE, x + m * ldx, ldx, K, to + m * ldt + j, ldt, false, none);
      });
    }
  }
}

}  // namespace
