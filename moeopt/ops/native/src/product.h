// The product of a block of W with some rows of x, by the tile that W's dtype and strides ask for, whatever the number of rows.
#pragma once
#include "by_lane.h"
#include "codes.h"
#include "outer.h"
#include "pairs.h"
#include "rounded.h"
#include "tile.h"
#include "turned.h"

namespace {

constexpr int64_t FEW = 6;  // rows of x up to which 16-bit weights are widened on the way, and beyond it into a panel

// x: rows of float32, of bfloat16 where `paired` (then W is bfloat16, and k or its rows are contiguous), or of what rounded.h makes of them
void product(const View &v, int64_t compute, bool paired, int64_t first, int64_t n, const void *x, int64_t ldx, int64_t K,
             int64_t M, float *to, int64_t ldt, float *panel) {
  if (!K) {  // an expert without neurons: sums of nothing
    for (int64_t m = 0; m < M; m++) memset(to + m * ldt, 0, n * sizeof(float));
    return;
  }
  if (v.rounds) return dot_rounded(v, first, n, x, ldx, K, M, to, ldt, panel);
  if (is_code(v.dtype)) return dot_codes(v, compute, first, n, (const float *)x, ldx, K, M, to, ldt, panel);
#if defined(__AVX512F__)
  if (v.by_lane) {
    const uint32_t *xl = (const uint32_t *)x;
    const int64_t ld = paired ? ldx / 2 : ldx;
#if defined(__AVX512BF16__)
    if (paired) return lane_product<LanePairs>(v, first, n, xl, ld, K, M, to, ldt, panel);
#endif
    if (v.dtype == MOEOPT_F32) return lane_product<LaneNumbers<F32>>(v, first, n, xl, ld, K, M, to, ldt, panel);
    if (v.dtype == MOEOPT_BF16) return lane_product<LaneNumbers<BF16>>(v, first, n, xl, ld, K, M, to, ldt, panel);
    return lane_product<LaneNumbers<F16>>(v, first, n, xl, ld, K, M, to, ldt, panel);
  }
#endif
  if (paired && v.tiles) return v.tiles({(const uint16_t *)v.data + first * v.so, v.so, v.si, n, (const uint16_t *)x, ldx, K, M, to, ldt, (uint16_t *)panel});
#if defined(__AVX512BF16__)
  if (paired && v.si == 1) return pairs_direct(v, first, n, (const uint16_t *)x, ldx, K, M, to, ldt);
  if (paired) return outer_direct<OuterPairs>(v, first, n, (const uint16_t *)x, ldx, K, M, to, ldt, panel);
#endif
  (void)paired;
  const float *xf = (const float *)x;
  if (v.exact && v.si == 1 && K <= TURNED) {
    outer_turned(v, first, n, xf, ldx, K, M, to, ldt, panel);
  } else if (v.exact && v.si == 1 && (v.dtype == MOEOPT_F32 || M <= FEW)) {
    if (v.dtype == MOEOPT_F32) dot_direct<F32>(v, first, n, xf, ldx, K, M, to, ldt);
    else if (v.dtype == MOEOPT_BF16) dot_direct<BF16>(v, first, n, xf, ldx, K, M, to, ldt);
    else dot_direct<F16>(v, first, n, xf, ldx, K, M, to, ldt);
  } else if (v.exact && v.so == 1 && v.si != 1) {
    if (v.dtype == MOEOPT_F32) outer_direct<Outer<F32>>(v, first, n, xf, ldx, K, M, to, ldt, panel);
    else if (v.dtype == MOEOPT_BF16) outer_direct<Outer<BF16>>(v, first, n, xf, ldx, K, M, to, ldt, panel);
    else outer_direct<Outer<F16>>(v, first, n, xf, ldx, K, M, to, ldt, panel);
  } else {
    dot_panel(v, compute, first, n, xf, ldx, K, M, to, ldt, panel);
  }
}

}  // namespace
