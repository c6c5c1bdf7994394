// A few rows of 8 bits times W's codes, read where they lie: see rounded.h.
#pragma once
#include "rounded_lanes.h"

#if defined(__AVX2__)

namespace {

#if MOEOPT_VNNI

// A line of 64 bytes of 16 rows of W, `step` bytes apart, times NX rows of x: the codes of a row's blocks lie in the four parts of a
// vector. Four rows are turned at a time, so that a lane has four codes of one row in one block; no lanes are added up.
template <class C, int NX>
inline void line_rounded(Scaled (&acc)[NX], const char *w, int64_t step, const RowBlock *const (&x)[NX], int64_t blocks, const float *scales,
                         const int32_t *zeros, int64_t ahead) {
  constexpr int BLOCKS = 64 / C::SIZE, SETS = C::SIZE == 16 ? 2 : 1;  // sets of four vectors of codes: low and high halves of bytes
  const int64_t three = kept_apart(3 * step);
  Sums fours[NX][4 * SETS], d[NX][4];
  UNROLL for (int m = 0; m < NX; m++)
    UNROLL for (int set = 0; set < SETS; set++) {
      const Sums q = C::SIZE == 16 ? four_parts(x[m]->q + 16 * set, sizeof(RowBlock)) : two_halves(x[m][0].q, x[m][BLOCKS - 1].q);
      Sums *to = fours[m] + 4 * set;
      to[0] = _mm512_shuffle_epi32(q, (_MM_PERM_ENUM)0x00), to[1] = _mm512_shuffle_epi32(q, (_MM_PERM_ENUM)0x55);
      to[2] = _mm512_shuffle_epi32(q, (_MM_PERM_ENUM)0xaa), to[3] = _mm512_shuffle_epi32(q, (_MM_PERM_ENUM)0xff);
    }
  UNROLL for (int group = 0; group < 4; group++, w = kept_apart(w + 4 * step)) {
    Sums r[4], codes[4 * SETS];
    UNROLL for (int i = 0; i < 4; i++) {
      const char *at = w + (i == 3 ? three : i * step);
      __builtin_prefetch(at + ahead, 0, 2);
      r[i] = sums_at(at);
    }
    turn4(r);
    UNROLL for (int i = 0; i < 4; i++) {
      if constexpr (C::SIZE == 16) {
        codes[i] = _mm512_and_si512(r[i], _mm512_set1_epi8(15));
        codes[4 * SETS - 4 + i] = _mm512_and_si512(_mm512_srli_epi16(r[i], 4), _mm512_set1_epi8(15));
      } else {
        codes[i] = C::SHIFTED ? _mm512_xor_si512(r[i], _mm512_set1_epi8((char)0x80)) : r[i];
      }
    }
    UNROLL for (int m = 0; m < NX; m++) {
      d[m][group] = sums(0);
      UNROLL for (int i = 0; i < 4 * SETS; i++) d[m][group] = dot4<C::SIGNS>(d[m][group], codes[i], fours[m][i]);
    }
  }
  UNROLL for (int m = 0; m < NX; m++) {
    turn4_parts(d[m]);
    UNROLL for (int b = 0; b < BLOCKS; b++) {
      if (b >= blocks) break;
      const Sums sum = C::SIZE == 16 ? d[m][b] : _mm512_add_epi32(d[m][2 * b], d[m][2 * b + 1]);
      Sums less = sums(x[m][b].less);
      if (zeros) less = times(less, sums_at(zeros + b * LANES));
      acc[m] = scaled(_mm512_add_epi32(sum, less), scales + b * LANES, x[m][b].step, acc[m]);
    }
  }
}

// LANES rows of W where they lie, times NX rows; apart: they lie at even steps. Rows `ahead` bytes behind them are fetched meanwhile.
template <class C, int NX>
inline void few_rounded(const View &v, const int64_t *row, bool apart, int64_t first, int64_t count, int64_t K, const char *x, int64_t ldx, float *to,
                        int64_t ldt, const float *scales, const int32_t *zeros, int64_t ahead) {
  constexpr int BLOCKS = 64 / C::SIZE;
  const int64_t step = block_at<C>(v, 1, 0) - block_at<C>(v, 0, 0);
  Scaled acc[NX];
  const RowBlock *blocks[NX];
  UNROLL for (int m = 0; m < NX; m++) {
    acc[m] = first ? _mm512_loadu_ps(to + m * ldt) : _mm512_setzero_ps();
    blocks[m] = (const RowBlock *)(x + m * ldx) + first;
  }
  for (int64_t b = 0; b < count; b += BLOCKS) {
    const int64_t left = smaller(BLOCKS, count - b), n = smaller(left * ROW_BLOCK, K - (first + b) * ROW_BLOCK);
    const int32_t *zero = zeros ? zeros + b * LANES : nullptr;
    if (apart && n == BLOCKS * ROW_BLOCK) {
      line_rounded<C, NX>(acc, block_at<C>(v, row[0], first + b), step, blocks, BLOCKS, scales + b * LANES, zero, ahead);
    } else {  // behind the last row or the last code is nothing that may be read
      alignas(64) char line[LANES * 64] = {};
      RowBlock copied[NX][BLOCKS] = {};
      const RowBlock *copies[NX];
      for (int i = 0; i < LANES; i++) memcpy(line + i * 64, block_at<C>(v, row[i], first + b), C::SIZE == 32 ? n : (n + 1) / 2);
      for (int m = 0; m < NX; m++) memcpy(copied[m], blocks[m], left * sizeof(RowBlock)), copies[m] = copied[m];
      line_rounded<C, NX>(acc, line, 64, copies, left, scales + b * LANES, zero, 0);
    }
    UNROLL for (int m = 0; m < NX; m++) blocks[m] += BLOCKS;
  }
  UNROLL for (int m = 0; m < NX; m++) _mm512_storeu_ps(to + m * ldt, acc[m]);
}

#else

// Eight rows of W where they lie, times NX rows. Rows `ahead` bytes behind them are fetched meanwhile.
template <class C, int NX>
inline void few_rounded(const View &v, const int64_t *row, bool, int64_t first, int64_t count, int64_t K, const char *x, int64_t ldx, float *to,
                        int64_t ldt, const float *scales, const int32_t *zeros, int64_t ahead) {
  const char *w[8];
  UNROLL for (int j = 0; j < 8; j++) w[j] = block_at<C>(v, row[j], first);
  __m256 acc[NX];
  UNROLL for (int m = 0; m < NX; m++) acc[m] = first ? _mm256_loadu_ps(to + m * ldt) : _mm256_setzero_ps();
  const auto row_block = [&](int m, int64_t b) { return (const RowBlock *)(x + m * ldx) + first + b; };
  const auto add = [&](int m, int64_t b, __m256i sums) {
    __m256i less = _mm256_set1_epi32(row_block(m, b)->less);
    if (zeros) less = _mm256_mullo_epi32(less, _mm256_loadu_si256((const __m256i *)(zeros + b * 8)));
    const __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(sums, less)), _mm256_loadu_ps(scales + b * 8));
    acc[m] = _mm256_fmadd_ps(y, _mm256_set1_ps(row_block(m, b)->step), acc[m]);
  };
  int64_t b = 0;
  if constexpr (C::SIZE == 16) {  // the halves of a vector have a block each: nothing is moved to separate nibbles or sums
    for (; b + 2 <= count && (first + b + 2) * ROW_BLOCK <= K; b += 2) {
      if (b % 4 == 0) {
        UNROLL for (int j = 0; j < 8; j++) __builtin_prefetch(w[j] + ahead + b * C::SIZE, 0, 2);
      }
      UNROLL for (int m = 0; m < NX; m++) {
        const __m256i q0 = _mm256_loadu_si256((const __m256i *)row_block(m, b)->q), q1 = _mm256_loadu_si256((const __m256i *)row_block(m, b + 1)->q);
        const __m256i evens = _mm256_permute2x128_si256(q0, q1, 0x20), odds = _mm256_permute2x128_si256(q0, q1, 0x31);
        __m256i d[8], lower, upper;
        UNROLL for (int j = 0; j < 8; j++) {
          const __m256i both = _mm256_loadu_si256((const __m256i *)(w[j] + b * C::SIZE)), low = _mm256_set1_epi8(15);
          d[j] = dot4<C::SIGNS>(_mm256_setzero_si256(), _mm256_and_si256(both, low), evens);
          d[j] = dot4<C::SIGNS>(d[j], _mm256_and_si256(_mm256_srli_epi16(both, 4), low), odds);
        }
        sum8(d, lower, upper);
        add(m, b, lower), add(m, b + 1, upper);
      }
    }
  }
  for (; b < count; b++) {
    if (b % (64 / C::SIZE) == 0) {
      UNROLL for (int j = 0; j < 8; j++) __builtin_prefetch(w[j] + ahead + b * C::SIZE, 0, 2);
    }
    __m256i codes[8];
    eight_blocks<C>(codes, w, b, K - (first + b) * ROW_BLOCK);
    UNROLL for (int m = 0; m < NX; m++) {
      const __m256i q = _mm256_loadu_si256((const __m256i *)row_block(m, b)->q);
      __m256i d[8], lower, upper;
      UNROLL for (int j = 0; j < 8; j++) d[j] = dot4<C::SIGNS>(_mm256_setzero_si256(), codes[j], q);
      sum8(d, lower, upper);
      add(m, b, _mm256_add_epi32(lower, upper));
    }
  }
  UNROLL for (int m = 0; m < NX; m++) _mm256_storeu_ps(to + m * ldt, acc[m]);
}

#endif

}  // namespace

#endif
