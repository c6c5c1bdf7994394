// Products on quantised W: codes become floats in registers for few rows of x, else four rows of W at a time in the
// nearest cache.
//
//   W[o][i] = (code - zero) * scales[o * scale_stride + i / block]        I8: zero is 0; U4: zero is 8, low half of a byte first
//
// Each weight is rounded once to float32, and once more to the compute dtype, as the reference makes it. In memory W stays
// as it is: what is read of it are its codes and scales.
#pragma once
#include "tile.h"

namespace {

inline bool is_code(int64_t dtype) { return dtype == MOEOPT_I8 || dtype == MOEOPT_U4; }

// Codes i .. i + L of a row, less the zero point. Intrinsics: compilers take conversions from 8 bits apart.
struct I8 {
  static V ld(const char *row, int64_t i) {
#if defined(__AVX512F__)
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(row + i))));
#elif defined(__AVX2__)
    return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(row + i))));
#else
    V v;
    for (int j = 0; j < L; j++) v[j] = (float)((const int8_t *)row)[i + j];
    return v;
#endif
  }
  static int64_t bytes(int64_t codes) { return codes; }
};
struct U4 {  // i is even; a byte becomes two lanes of 32 bits
  static V ld(const char *row, int64_t i) {
    const char *at = row + i / 2;
#if defined(__AVX512F__)
    const __m512i q = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)at));
    const __m512i both = _mm512_or_si512(_mm512_and_si512(q, _mm512_set1_epi64(15)), _mm512_slli_epi64(_mm512_srli_epi64(q, 4), 32));
    return (V)_mm512_cvtepi32_ps(_mm512_sub_epi32(both, _mm512_set1_epi32(8)));
#elif defined(__AVX2__)
    int32_t four; memcpy(&four, at, 4);
    const __m256i q = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    const __m256i both = _mm256_or_si256(_mm256_and_si256(q, _mm256_set1_epi64x(15)), _mm256_slli_epi64(_mm256_srli_epi64(q, 4), 32));
    return (V)_mm256_cvtepi32_ps(_mm256_sub_epi32(both, _mm256_set1_epi32(8)));
#else
    V v;
    for (int j = 0; j < L; j += 2) {
      const uint8_t byte = (uint8_t)at[j / 2];
      v[j] = (float)((byte & 15) - 8), v[j + 1] = (float)((byte >> 4) - 8);
    }
    return v;
#endif
  }
  static int64_t bytes(int64_t codes) { return codes / 2; }
};

inline V load_codes(const char *row, int64_t dtype, int64_t i) { return dtype == MOEOPT_I8 ? I8::ld(row, i) : U4::ld(row, i); }

inline float scale_at(const View &v, int64_t o, int64_t block) {
  const int64_t at = o * v.ss + block;
  if (v.scale_dtype == MOEOPT_F32) return ((const float *)v.scales)[at];
  if (v.scale_dtype == MOEOPT_F16) return load_one(v.scales, v.scale_dtype, at);
  const uint32_t wide = (uint32_t)((const uint16_t *)v.scales)[at] << 16;
  float scale; memcpy(&scale, &wide, sizeof scale);
  return scale;
}

inline float load_code(const void *row, int64_t dtype, int64_t i) {
  if (dtype == MOEOPT_I8) return (float)((const int8_t *)row)[i];
  return (float)(((((const uint8_t *)row)[i / 2] >> (i % 2 * 4)) & 15) - 8);
}

// weights k .. k + n of row o as floats
inline void dequantized_row(float *to, const View &v, int64_t o, int64_t k, int64_t n, int64_t compute) {
  const char *row = (const char *)v.data + (v.dtype == MOEOPT_I8 ? o * v.so : o * v.so / 2);
  for (int64_t i = 0; i < n;) {
    const int64_t block = (k + i) / v.block, end = smaller(n, (block + 1) * v.block - k);
    const float scale = scale_at(v, o, block);
    for (; i + L <= end && !((k + i) & 1); i += L) {
      const V w = load_codes(row, v.dtype, k + i) * scale;
      store(to + i, compute == MOEOPT_F32 ? w : round_to(w, compute));
    }
    for (; i < end; i++) to[i] = round_one(load_code(row, v.dtype, k + i) * scale, compute);
  }
}

// NW rows of codes times NX rows of x, each code made float in a register: no panel is written. Blocks are whole vectors.
template <class C, int NW, int NX>
inline void codes_tile(const View &v, const int64_t *row, int64_t k, int64_t n, const float *x, int64_t ldx, float *to, int64_t ldt, bool add) {
  V acc[NX][NW];
  UNROLL for (int i = 0; i < NX; i++)
    UNROLL for (int j = 0; j < NW; j++) acc[i][j] = V{};
  const char *w[NW];
  UNROLL for (int j = 0; j < NW; j++) w[j] = (const char *)v.data + C::bytes(row[j] * v.so);
  for (int64_t i = 0; i < n;) {
    const int64_t block = (k + i) / v.block, end = smaller(n, (block + 1) * v.block - k);
    V scale[NW];
    UNROLL for (int j = 0; j < NW; j++) scale[j] = splat(scale_at(v, row[j], block));
    for (; i + L <= end; i += L) {
      V b[NX];
      UNROLL for (int m = 0; m < NX; m++) b[m] = load(x + m * ldx + i);
      UNROLL for (int j = 0; j < NW; j++) {
        const V a = C::ld(w[j], k + i) * scale[j];
        UNROLL for (int m = 0; m < NX; m++) acc[m][j] += a * b[m];
      }
    }
    if (i < end) {  // the last of a row
      UNROLL for (int j = 0; j < NW; j++) {
        V a{};
        for (int64_t c = i; c < end; c++) a[c - i] = load_code(w[j], v.dtype, k + c) * scale[j][0];
        UNROLL for (int m = 0; m < NX; m++) acc[m][j] += a * load(x + m * ldx + i);  // x has zeros behind its end
      }
      i = end;
    }
  }
  UNROLL for (int m = 0; m < NX; m++) finish(acc[m], to + m * ldt, add);
}

template <class C>
void dot_codes_direct(const View &v, int64_t first, int64_t n, const float *x, int64_t ldx, int64_t K, int64_t M, float *to, int64_t ldt) {
  const int64_t chunk = chunk_of(K, DOT_CHUNK);
  for (int64_t k = 0; k < K; k += chunk) {
    const int64_t kc = smaller(chunk, K - k);
    for (int64_t j = 0; j < n;) {
      int64_t row[8];
      for (int i = 0; i < 8; i++) row[i] = first + smaller(j + i, n - 1);
      if (M == 1 && j + 8 <= n) {
        codes_tile<C, 8, 1>(v, row, k, kc, x + k, ldx, to + j, ldt, k > 0), j += 8;
        continue;
      }
      for (int64_t m = 0; m < M;) {
        const float *at = x + m * ldx + k;
        float *out = to + m * ldt + j;
        if (M - m >= 3) codes_tile<C, 4, 3>(v, row, k, kc, at, ldx, out, ldt, k > 0), m += 3;
        else if (M - m == 2) codes_tile<C, 4, 2>(v, row, k, kc, at, ldx, out, ldt, k > 0), m += 2;
        else codes_tile<C, 4, 1>(v, row, k, kc, at, ldx, out, ldt, k > 0), m += 1;
      }
      j += 4;
    }
  }
}

constexpr int64_t FEW_CODES = 3;  // rows of x up to which codes become floats in registers, and beyond it in a panel

void dot_codes(const View &v, int64_t compute, int64_t first, int64_t n, const float *x, int64_t ldx, int64_t K, int64_t M,
               float *to, int64_t ldt, float *panel) {
  if (M <= FEW_CODES && compute == MOEOPT_F32 && (v.block % L == 0 || v.block >= K)) {
    if (v.dtype == MOEOPT_I8) return dot_codes_direct<I8>(v, first, n, x, ldx, K, M, to, ldt);
    return dot_codes_direct<U4>(v, first, n, x, ldx, K, M, to, ldt);
  }
  const int64_t chunk = chunk_of(K, DOT_CHUNK), ld = chunk + 16;
  const float *w[4] = {panel, panel + ld, panel + 2 * ld, panel + 3 * ld};
  for (int64_t k = 0; k < K; k += chunk) {
    const int64_t kc = smaller(chunk, K - k);
    for (int64_t j = 0; j < n; j += 4) {
      for (int i = 0; i < 4; i++) dequantized_row(panel + i * ld, v, first + smaller(j + i, n - 1), k, kc, compute);
      dot_rows<F32, 4>(w, 0, x + k, ldx, kc, M, to + j, ldt, k > 0);
    }
  }
}

}  // namespace
