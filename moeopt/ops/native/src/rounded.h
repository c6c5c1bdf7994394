// Products of rows that were rounded to 8 bits with W's codes: integers are summed exactly, and each block's sum is scaled once.
//
//   y[m][j] = sum over blocks of 32 of  float(sum of q[m][i] * (code[j][i] - zero)) * scale[j] * step[m]
//
// Blocks are added in their order, by one multiply and one multiply-add each, whatever the number of rows: a token's bits
// depend on no other. A few rows are multiplied by W where it lies; for more, rows of W are turned once, so that a lane has
// a row of W and a sum is ready without adding lanes up. Nothing saturates: codes below 0 are either shifted to begin at 0,
// or lend their sign to the other factor, whose least number is -127.
#pragma once
#include <cmath>

#include "codes.h"
#include "outer.h"

namespace {

constexpr int ROW_BLOCK = 32;
constexpr float ROW_STEPS = 127.f, LEAST_ROUNDED = 0x1p-119f;  // a block of smaller numbers is one of zeros

struct RowBlock {  // of a row of x, in the place of 32 floats
  int8_t q[ROW_BLOCK];
  float step;    // NaN where a number of the block is NaN or infinite
  int32_t less;  // what the sum of products has too much, since W's codes are counted from 0; of those with zero points, the sum of -q
};
static_assert(sizeof(RowBlock) == 40, "it fits where its floats were");

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define MOEOPT_VNNI 1
#else
#define MOEOPT_VNNI 0
#endif

// n numbers, of which those behind K are zeros. evens: those of even places first, as the codes in low halves of bytes lie
inline void round_block(RowBlock *to, const float *x, int64_t n, bool evens, int32_t zero) {
  alignas(64) float v[ROW_BLOCK] = {};
  memcpy(v, x, n * sizeof(float));
  float largest = 0.f;
  bool finite = true;
  for (int i = 0; i < ROW_BLOCK; i++) {
    const float size = fabsf(v[i]);
    largest = size > largest ? size : largest;
    finite &= size <= 3.402823466e38f;  // a NaN compares false
  }
  const bool some = finite && largest >= LEAST_ROUNDED;
  const float step = largest / ROW_STEPS;
  int32_t sum = 0;
  alignas(64) int8_t q[ROW_BLOCK];
  for (int i = 0; i < ROW_BLOCK; i++) {
    const float shifted = (some ? v[i] / step : 0.f) + 12582912.f;  // 1.5 * 2^23: to the nearest whole number, ties to even
    int32_t code;
    memcpy(&code, &shifted, 4);
    q[i] = (int8_t)(code - 0x4b400000);
  }
  for (int i = 0; i < ROW_BLOCK; i++) sum += q[i];
  for (int i = 0; i < ROW_BLOCK; i++) to->q[evens ? i / 2 + i % 2 * 16 : i] = q[i];
  to->step = finite ? (some ? step : 0.f) : NAN;
  to->less = -zero * sum;
}

// a row of K floats, rounded where it lies
inline void round_row(float *row, int64_t K, bool evens, int32_t zero) {
  for (int64_t b = 0; b * ROW_BLOCK < K; b++) {
    RowBlock block;
    round_block(&block, row + b * ROW_BLOCK, smaller(ROW_BLOCK, K - b * ROW_BLOCK), evens, zero);
    memcpy((char *)row + b * sizeof block, &block, sizeof block);  // 40 bytes of 128 that were read
  }
}

// How codes lie, and what is 0 among them: VNNI takes codes from 0 on, and so does what adds up products of pairs; signed
// bytes lend it their sign, where they can.
struct Bytes {
  static constexpr int SIZE = 32;  // bytes of a block
  static constexpr int32_t ZERO = MOEOPT_VNNI ? 128 : 0;
  static constexpr bool SIGNS = !MOEOPT_VNNI;
};
struct Nibbles {
  static constexpr int SIZE = 16;
  static constexpr int32_t ZERO = 8;
  static constexpr bool SIGNS = false;
};

inline int32_t zero_of(int64_t dtype, bool zeros) {  // what round_row takes, for rows that meet these codes
  return zeros ? 1 : dtype == MOEOPT_I8 ? Bytes::ZERO : Nibbles::ZERO;
}

template <class C>
inline const char *block_at(const View &v, int64_t o, int64_t b) { return (const char *)v.data + o * v.so * C::SIZE / ROW_BLOCK + b * C::SIZE; }

// scales and zero points of row o of W for `count` blocks of 32 from `first` on
inline void scales_by_32(float *to, const View &v, int64_t o, int64_t first, int64_t count) {
  if (v.block == ROW_BLOCK) return scales_of_row(to, v, o, first, count);
  for (int64_t b = 0; b < count; b++) to[b] = scale_at(v, o, (first + b) * ROW_BLOCK / v.block);
}
inline void zeros_by_32(int32_t *to, const View &v, int64_t o, int64_t first, int64_t count) {
  const uint8_t *row = (const uint8_t *)v.zeros + o * v.zs;
  for (int64_t b = 0; b < count; b++) to[b] = row[(first + b) * ROW_BLOCK / v.block];
}

#if defined(__AVX2__)

template <class C>
inline __m256i codes_at(const char *at) {
  if constexpr (C::SIZE == 16) {
    const __m128i w = _mm_loadu_si128((const __m128i *)at);
    return _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(w), _mm_srli_epi16(w, 4), 1), _mm256_set1_epi8(15));
  }
  const __m256i w = _mm256_loadu_si256((const __m256i *)at);
  return MOEOPT_VNNI ? _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80)) : w;
}

// block b of eight rows of K codes; those behind K are any
template <class C>
inline void eight_blocks(__m256i (&codes)[8], const char *const (&w)[8], int64_t b, int64_t n) {
  if (n >= ROW_BLOCK) {
    UNROLL for (int j = 0; j < 8; j++) codes[j] = codes_at<C>(w[j] + b * C::SIZE);
    return;
  }
  for (int j = 0; j < 8; j++) {
    alignas(32) char raw[32] = {};
    memcpy(raw, w[j] + b * C::SIZE, C::SIZE == 32 ? n : (n + 1) / 2);
    codes[j] = codes_at<C>(raw);
  }
}

// `sum`, and of each lane four products
template <bool SIGNS>
inline __m256i dot4(__m256i sum, __m256i w, __m256i x) {
#if MOEOPT_VNNI
  return _mm256_dpbusd_epi32(sum, w, x);
#else
  const __m256i pairs = SIGNS ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)) : _mm256_maddubs_epi16(w, x);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

// eight rows of eight 32-bit numbers become eight columns
inline void turn8(__m256i (&r)[8]) {
  __m256i t[8];
  UNROLL for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  UNROLL for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    const __m256i low = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    r[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31), r[i] = low;
  }
}

// the sums of the lower four lanes of each of eight vectors, and of the upper four
inline void sum8(const __m256i (&d)[8], __m256i &lower, __m256i &upper) {
  const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(d[0], d[1]), _mm256_hadd_epi32(d[2], d[3]));
  const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(d[4], d[5]), _mm256_hadd_epi32(d[6], d[7]));
  lower = _mm256_permute2x128_si256(a, b, 0x20), upper = _mm256_permute2x128_si256(a, b, 0x31);
}

#if MOEOPT_VNNI
constexpr int LANES = 16, FEW_ROUNDED = 6, NX_ROUNDED = 12, LEAST_SHARE = 6;
typedef __m512i Sums;
typedef __m512 Scaled;
inline Sums sums(int32_t a) { return _mm512_set1_epi32(a); }
inline Sums sums_at(const void *p) { return _mm512_loadu_si512(p); }
inline Sums times(Sums a, Sums b) { return _mm512_mullo_epi32(a, b); }
inline Scaled scaled(Sums a, const float *scale, float step, Scaled y) {
  return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(a), _mm512_loadu_ps(scale)), _mm512_set1_ps(step), y);
}
template <bool SIGNS>
inline Sums dot4(Sums sum, Sums w, Sums x) { return _mm512_dpbusd_epi32(sum, w, x); }
#else
constexpr int LANES = 8, FEW_ROUNDED = 3, NX_ROUNDED = 4, LEAST_SHARE = 2;
typedef __m256i Sums;
typedef __m256 Scaled;
inline Sums sums(int32_t a) { return _mm256_set1_epi32(a); }
inline Sums sums_at(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
inline Sums times(Sums a, Sums b) { return _mm256_mullo_epi32(a, b); }
inline Scaled scaled(Sums a, const float *scale, float step, Scaled y) {
  return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(a), _mm256_loadu_ps(scale)), _mm256_set1_ps(step), y);
}
#endif

#if MOEOPT_VNNI

template <class T>
inline T kept_apart(T a) {  // else compilers make a register of each sum of it and a step, and have not so many
  asm("" : "+r"(a));
  return a;
}

inline Sums two_halves(const void *low, const void *high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)low)), _mm256_loadu_si256((const __m256i *)high), 1);
}

// four times 16 bytes, `step` bytes apart
inline Sums four_parts(const void *first, int64_t step) {
  const auto at = [&](int i) { return _mm_loadu_si128((const __m128i *)((const char *)first + i * step)); };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(at(2)), at(3), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// four by four numbers of 32 bits, in each of the four parts of vectors
inline void turn4(Sums (&r)[4]) {
  const Sums a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
  const Sums c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
  r[0] = _mm512_unpacklo_epi64(a, c), r[1] = _mm512_unpackhi_epi64(a, c), r[2] = _mm512_unpacklo_epi64(b, d), r[3] = _mm512_unpackhi_epi64(b, d);
}

// four by four parts of vectors
inline void turn4_parts(Sums (&r)[4]) {
  const Sums a = _mm512_shuffle_i32x4(r[0], r[1], 0x44), b = _mm512_shuffle_i32x4(r[0], r[1], 0xee);
  const Sums c = _mm512_shuffle_i32x4(r[2], r[3], 0x44), d = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
  r[0] = _mm512_shuffle_i32x4(a, c, 0x88), r[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  r[2] = _mm512_shuffle_i32x4(b, d, 0x88), r[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

#endif

constexpr int64_t CHUNK = 32, SCALES = CHUNK * LANES;  // blocks of a row that are multiplied at once; scales of LANES rows of them
constexpr int64_t AHEAD = 16384;                       // bytes of W from what is multiplied to what is fetched
static_assert(PANEL_SUMS >= 2 * SCALES + CHUNK * LANES * ROW_BLOCK / 4, "scales, zero points and codes");

// to[block][row] and zeros[block][row], of LANES rows of W; those `ahead` rows behind are fetched. apart: they lie at even steps
inline void turn_scales(float *to, int32_t *zeros, const View &v, const int64_t *row, bool apart, int64_t first, int64_t count, int64_t ahead) {
  alignas(32) float part[8][CHUNK] = {};
  const int64_t size = v.scale_dtype == MOEOPT_F32 ? 4 : 2;
  for (int i = 0; i < LANES; i++)
    for (int64_t at = 0; at < (v.block == ROW_BLOCK ? count * size : 1); at += 64)
      __builtin_prefetch((const char *)v.scales + ((row[i] + ahead) * v.ss + first * ROW_BLOCK / v.block) * size + at, 0, 2);
#if MOEOPT_VNNI
  if (apart && v.scale_dtype == MOEOPT_F32 && v.block == ROW_BLOCK && !v.zeros) {
    const float *at = (const float *)v.scales + row[0] * v.ss + first;
    for (; count >= 4; count -= 4, first += 4, at += 4, to += 4 * LANES) {
      Sums r[4];
      UNROLL for (int i = 0; i < 4; i++) r[i] = four_parts(at + i * v.ss, 16 * v.ss);
      turn4(r);
      UNROLL for (int i = 0; i < 4; i++) _mm512_storeu_si512(to + i * LANES, r[i]);
    }
    if (!count) return;
  }
#endif
  for (int which = 0; which < (v.zeros ? 2 : 1); which++)
    for (int j = 0; j < LANES; j += 8) {
      for (int i = 0; i < 8; i++) {
        if (which) zeros_by_32((int32_t *)part[i], v, row[j + i], first, count);
        else scales_by_32(part[i], v, row[j + i], first, count);
      }
      char *out = which ? (char *)zeros : (char *)to;
      for (int64_t b = 0; b < count; b += 8) {
        __m256i r[8];
        UNROLL for (int i = 0; i < 8; i++) r[i] = _mm256_load_si256((const __m256i *)(part[i] + b));
        turn8(r);
        UNROLL for (int i = 0; i < 8; i++) _mm256_storeu_si256((__m256i *)(out + ((b + i) * LANES + j) * 4), r[i]);
      }
    }
}

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
      if (C::SIZE == 16) {
        codes[i] = _mm512_and_si512(r[i], _mm512_set1_epi8(15));
        codes[4 * SETS - 4 + i] = _mm512_and_si512(_mm512_srli_epi16(r[i], 4), _mm512_set1_epi8(15));
      } else {
        codes[i] = _mm512_xor_si512(r[i], _mm512_set1_epi8((char)0x80));
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
        if (C::SIZE == 32) codes[i] = (int8_t)at[i];
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
  const auto of = v.dtype == MOEOPT_I8 ? dot_rounded_of<Bytes> : dot_rounded_of<Nibbles>;
  of(v, first, n, (const char *)x, ldx * 4, K, M, to, ldt, scratch);
}

}  // namespace
