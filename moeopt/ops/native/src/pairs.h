// Products of bfloat16 by pairs: two products of 16-bit factors and their sum in one instruction, float32 outside.
#pragma once
#include "tile.h"

namespace {

#if defined(__AVX512BF16__)
// both factors bfloat16: pairs of products, summed in float32
template <int NW, int NX, int FETCH>
inline void pairs(const uint16_t *const *w, int64_t ahead, const uint16_t *const *next, const uint16_t *x, int64_t ldx, int64_t n, float *to, int64_t ldt, bool add) {
  V acc[NX][NW];
  UNROLL for (int i = 0; i < NX; i++)
    UNROLL for (int j = 0; j < NW; j++) acc[i][j] = V{};
  const uint16_t *wp[NW];
  UNROLL for (int j = 0; j < NW; j++) wp[j] = w[j];
  const uint16_t *np[FETCH + 1];
  UNROLL for (int j = 0; j < FETCH; j++) np[j] = FETCH == NW ? nullptr : next[j];
  for (int64_t k = 0; k < n; k += 32) {
    UNROLL for (int j = 0; j < FETCH; j++) __builtin_prefetch((FETCH == NW ? wp[j] + ahead : np[j]) + k, 0, 2);
    const __mmask32 inside = n - k >= 32 ? 0xffffffffu : (1u << (n - k)) - 1;
    __m512bh a[NW];
    UNROLL for (int j = 0; j < NW; j++) {
      a[j] = (__m512bh)(inside == 0xffffffffu ? _mm512_loadu_si512(wp[j] + k) : _mm512_maskz_loadu_epi16(inside, wp[j] + k));
    }
    UNROLL for (int i = 0; i < NX; i++) {
      const __m512bh b = (__m512bh)_mm512_loadu_si512(x + i * ldx + k);
      UNROLL for (int j = 0; j < NW; j++) acc[i][j] = (V)_mm512_dpbf16_ps((__m512)acc[i][j], a[j], b);
    }
  }
  UNROLL for (int i = 0; i < NX; i++) finish(acc[i], to + i * ldt, add);
}

template <int NW, int FETCH>
int64_t pairs_some(const uint16_t *const *w, int64_t ahead, const uint16_t *const *next, const uint16_t *x, int64_t ldx, int64_t n, int64_t M, float *to, int64_t ldt, bool add) {
  switch (smaller(M, 6)) {  // the rows that were done
    case 6: pairs<NW, 6, FETCH>(w, ahead, next, x, ldx, n, to, ldt, add); return 6;
    case 5: pairs<NW, 5, FETCH>(w, ahead, next, x, ldx, n, to, ldt, add); return 5;
    case 4: pairs<NW, 4, FETCH>(w, ahead, next, x, ldx, n, to, ldt, add); return 4;
    case 3: pairs<NW, 3, FETCH>(w, ahead, next, x, ldx, n, to, ldt, add); return 3;
    case 2: pairs<NW, 2, FETCH>(w, ahead, next, x, ldx, n, to, ldt, add); return 2;
    default: pairs<NW, 1, FETCH>(w, ahead, next, x, ldx, n, to, ldt, add); return 1;
  }
}

void pairs_direct(const View &v, int64_t first, int64_t n, const uint16_t *x, int64_t ldx, int64_t K, int64_t M, float *to, int64_t ldt) {
  const int64_t chunk = chunk_of(K, PAIR_CHUNK);
  const uint16_t *w[8];
  for (int64_t k = 0; k < K; k += chunk) {
    const int64_t kc = smaller(chunk, K - k);
    for (int64_t j = 0; j < n;) {
      const int NW = M == 1 && j + 8 <= n ? 8 : 4;
      const int64_t ahead = j + NW < n || k + chunk >= K ? NW * v.so : chunk - j * v.so;
      if (NW == 8) {
        row_pointers<uint16_t, 8>(v, first, j, n, k, w);
        pairs<8, 1, 8>(w, ahead, nullptr, x + k, ldx, kc, to + j, ldt, k > 0);
      } else {
        row_pointers<uint16_t, 4>(v, first, j, n, k, w);
        in_tiles(w, ahead, M, 6, [&](auto fetch, const uint16_t *const *next, int64_t m) {
          return pairs_some<4, decltype(fetch)::value>(w, ahead, next, x + k + m * ldx, ldx, kc, M - m, to + j + m * ldt, ldt,
                                                       k > 0);
        });
      }
      j += NW;
    }
  }
}
#endif

}  // namespace
