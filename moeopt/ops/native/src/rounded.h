// Products of rows that were rounded to 8 bits with W's codes: integers are summed exactly, and each block's sum is scaled once.
//
//   y[m][j] = sum over blocks of 32 of  float(sum of q[m][i] * (code[j][i] - zero)) * scale[j] * step[m]
//
// Blocks are added in their order, by one multiply and one multiply-add each, whatever the number of rows: a token's bits
// depend on no other. A few rows are multiplied by W where it lies; for more, rows of W are turned once, so that a lane has
// a row of W and a sum is ready without adding lanes up. Nothing saturates: codes below 0 are either shifted to begin at 0,
// or lend their sign to the other factor, whose least number is -127.
#pragma once
#include "rounded_few.h"

namespace {

#if defined(__AVX2__)

// to[block][four codes][row]: LANES rows of W, four codes of a row beside those of the next
template <class C>
inline void turn_codes(char *to, const View &v, const int64_t *row, int64_t first, int64_t count, int64_t K, int64_t ahead) {
  for (int j = 0; j < LANES; j += 8) {
    const char *w[8];
    UNROLL for (int i = 0; i < 8; i++) w[i] = block_at<C>(v, row[j + i], first);
    for (int64_t b = 0; b < count; b++) {
      if (b % (64 / C::SIZE) == 0) {
        UNROLL for (int i = 0; i < 8; i++) __builtin_prefetch(w[i] + ahead + b * C::SIZE, 0, 2);
      }
      __m256i codes[8];
      eight_blocks<C>(codes, w, b, K - (first + b) * ROW_BLOCK);
      turn8(codes);
      UNROLL for (int i = 0; i < 8; i++) _mm256_storeu_si256((__m256i *)(to + ((b * 8 + i) * LANES + j) * 4), codes[i]);
    }
  }
}

// LANES turned rows of W times NX rows; SIGNS: their codes are signed
template <bool SIGNS, int NX>
inline void many_rounded(const char *codes, const float *scales, const int32_t *zeros, int64_t first, int64_t count, const char *x, int64_t ldx,
                         float *to, int64_t ldt) {
  Scaled acc[NX];
  UNROLL for (int m = 0; m < NX; m++) {
    acc[m] = Scaled{};
    if (first) memcpy(&acc[m], to + m * ldt, sizeof acc[m]);
  }
  for (int64_t b = 0; b < count; b++) {
    const char *at = x + (first + b) * (int64_t)sizeof(RowBlock);
    Sums d[NX];
    UNROLL for (int m = 0; m < NX; m++) d[m] = sums(((const RowBlock *)(at + m * ldx))->less);
    if (zeros) {
      const Sums zero = sums_at(zeros + b * LANES);
      UNROLL for (int m = 0; m < NX; m++) d[m] = times(d[m], zero);
    }
    for (int i = 0; i < 8; i++) {
      const Sums w = sums_at(codes + (b * 8 + i) * LANES * 4);
      UNROLL for (int m = 0; m < NX; m++) {
        int32_t four; memcpy(&four, at + m * ldx + 4 * i, 4);
        d[m] = dot4<SIGNS>(d[m], w, sums(four));
      }
    }
    UNROLL for (int m = 0; m < NX; m++) acc[m] = scaled(d[m], scales + b * LANES, ((const RowBlock *)(at + m * ldx))->step, acc[m]);
  }
  UNROLL for (int m = 0; m < NX; m++) memcpy(to + m * ldt, &acc[m], sizeof acc[m]);
}

template <class C>
void dot_rounded_of(const View &v, int64_t first, int64_t n, const char *x, int64_t ldx, int64_t K, int64_t M, float *to, int64_t ldt,
                    float *scratch) {
  float *scales = scratch;
  int32_t *zeros = v.zeros ? (int32_t *)(scratch + SCALES) : nullptr;
  char *codes = (char *)(scratch + 2 * SCALES);
  const int64_t blocks = (K + ROW_BLOCK - 1) / ROW_BLOCK, bytes = block_at<C>(v, 1, 0) - block_at<C>(v, 0, 0);
  const int64_t ahead = bytes > 0 ? up_to(smaller(AHEAD / bytes + 1, AHEAD / 64), LANES) : 0;  // rows; 0: all lie at one place
  for (int64_t j = 0; j < n; j += LANES) {
    int64_t row[LANES];
    for (int i = 0; i < LANES; i++) row[i] = first + smaller(j + i, n - 1);
    const bool apart = j + LANES <= n;
    for (int64_t b = 0; b < blocks; b += CHUNK) {
      const int64_t count = smaller(CHUNK, blocks - b);
      turn_scales(scales, zeros, v, row, apart, b, count, ahead);
      if (M <= FEW_ROUNDED) {
        in_rows<1, FEW_ROUNDED>(M, [&](auto rows) {
          few_rounded<C, decltype(rows)::value>(v, row, apart, b, count, K, x, ldx, to + j, ldt, scales, zeros, ahead * bytes);
        });
        continue;
      }
      turn_codes<C>(codes, v, row, b, count, K, ahead * bytes);
      for (int64_t m = 0, part = (M + NX_ROUNDED - 1) / NX_ROUNDED, share; part > 0; part--, m += share) {
        share = (M - m + part - 1) / part;
        in_rows<LEAST_SHARE, NX_ROUNDED>(share, [&](auto rows) {
          many_rounded<C::SIGNS, decltype(rows)::value>(codes, scales, zeros, b, count, x + m * ldx, ldx, to + m * ldt + j, ldt);
        });
      }
    }
  }
}

#else

template <class C>
void dot_rounded_of(const View &v, int64_t first, int64_t n, const char *x, int64_t ldx, int64_t K, int64_t M, float *to, int64_t ldt, float *) {
  for (int64_t j = 0; j < n; j++)
    for (int64_t b = 0; b * ROW_BLOCK < K; b++) {
      int8_t codes[ROW_BLOCK] = {};  // signed, or from 0 on and those of even places first
      const char *at = block_at<C>(v, first + j, b);
      for (int64_t i = 0; i < smaller(ROW_BLOCK, K - b * ROW_BLOCK); i++) {
        if constexpr (C::SIZE == 32) codes[i] = (int8_t)(C::SHIFTED ? at[i] ^ 0x80 : at[i]);
        else codes[i / 2 + i % 2 * 16] = (uint8_t)at[i / 2] >> (i % 2 * 4) & 15;
      }
      float scale;
      int32_t zero = 1;
      scales_by_32(&scale, v, first + j, b, 1);
      if (v.zeros) zeros_by_32(&zero, v, first + j, b, 1);
      for (int64_t m = 0; m < M; m++) {
        const RowBlock &row = ((const RowBlock *)(x + m * ldx))[b];
        int32_t sum = row.less * zero;
        for (int i = 0; i < ROW_BLOCK; i++) sum += codes[i] * row.q[i];
        float *y = to + m * ldt + j;
        *y = (b ? *y : 0.f) + (float)sum * scale * row.step;
      }
    }
}

#endif

// x: rows of RowBlock, of which ldx floats lie from one to the next; the columns of `to` behind n are garbage
void dot_rounded(const View &v, int64_t first, int64_t n, const void *x, int64_t ldx, int64_t K, int64_t M, float *to, int64_t ldt, float *scratch) {
  const auto of = v.dtype != MOEOPT_I8 ? dot_rounded_of<Nibbles> : v.zs ? dot_rounded_of<BytesAbout128> : dot_rounded_of<Bytes>;
  of(v, first, n, (const char *)x, ldx * 4, K, M, to, ldt, scratch);
}

}  // namespace
