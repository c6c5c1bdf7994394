// Rows of x in blocks of 8 bits with a step each, and where the codes and scales lie that they meet: see rounded.h.
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
#if MOEOPT_VNNI || defined(__AVXVNNI__)
#define MOEOPT_FOURS 1  // adds up four products of bytes: with AVX-512 in vectors of 64 bytes, else of 32
#else
#define MOEOPT_FOURS 0
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
  static constexpr int32_t ZERO = MOEOPT_FOURS ? 128 : 0;
  static constexpr bool SIGNS = !MOEOPT_FOURS;
  static constexpr bool SHIFTED = MOEOPT_FOURS;  // by 128 from what is stored, which flips the highest bit
};
struct BytesAbout128 : Bytes {
  static constexpr bool SHIFTED = !MOEOPT_FOURS;
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

// which of a row's scales each of `count` blocks of 32 from `first` on has: one division, as each takes as long as a block's products
template <class F>
inline void each_by_32(const View &v, int64_t first, int64_t count, F of) {
  int64_t at = first * ROW_BLOCK / v.block, end = (at + 1) * v.block;
  for (int64_t b = 0; b < count; b++) {
    if ((first + b) * ROW_BLOCK >= end) at++, end += v.block;
    of(b, at);
  }
}

// scales and zero points of row o of W for `count` blocks of 32 from `first` on
inline void scales_by_32(float *to, const View &v, int64_t o, int64_t first, int64_t count) {
  if (v.block == ROW_BLOCK) return scales_of_row(to, v, o, first, count);
  each_by_32(v, first, count, [&](int64_t b, int64_t at) { to[b] = scale_at(v, o, at); });
}
inline void zeros_by_32(int32_t *to, const View &v, int64_t o, int64_t first, int64_t count) {
  const uint8_t *row = (const uint8_t *)v.zeros + o * v.zs;
  each_by_32(v, first, count, [&](int64_t b, int64_t at) { to[b] = row[at]; });
}

}  // namespace
