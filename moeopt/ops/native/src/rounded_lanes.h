// How codes and scales come to lie in lanes, and what multiplies them there, with AVX2, AVX-VNNI and VNNI: see rounded.h.
#pragma once
#include "lanes.h"
#include "rounded_rows.h"

#if defined(__AVX2__)

namespace {

template <class C>
inline __m256i codes_at(const char *at) {
  if constexpr (C::SIZE == 16) {
    const __m128i w = _mm_loadu_si128((const __m128i *)at);
    return _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(w), _mm_srli_epi16(w, 4), 1), _mm256_set1_epi8(15));
  } else {
    const __m256i w = _mm256_loadu_si256((const __m256i *)at);
    return C::SHIFTED ? _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80)) : w;
  }
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
#elif MOEOPT_FOURS
  return _mm256_dpbusd_avx_epi32(sum, w, x);
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
constexpr int LANES = 8, FEW_ROUNDED = 3, NX_ROUNDED = MOEOPT_FOURS ? 6 : 4, LEAST_SHARE = MOEOPT_FOURS ? 3 : 2;
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
  if (!v.zeros && (first + count - 1) * ROW_BLOCK < v.block) {  // one scale for all of a row
    alignas(64) float of_row[LANES];
    for (int i = 0; i < LANES; i++) of_row[i] = scale_at(v, row[i], 0);
    for (int64_t b = 0; b < count; b++) memcpy(to + b * LANES, of_row, sizeof of_row);
    return;
  }
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

}  // namespace

#endif
