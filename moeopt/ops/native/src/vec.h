// Vectors of one instruction set: loads that widen, stores that round, sums in one fixed order. GCC and clang only.
// Compiled once for each instruction set; all is in an unnamed namespace, so that no two of them are merged by a linker.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa.h"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(MOEOPT_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VBYTES 64
#elif defined(__AVX2__)
#define VBYTES 32
#else
#define VBYTES 16
#endif

// Arrays of accumulators stay in registers only where every loop over them is unrolled.
#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int L = VBYTES / 4;  // lanes of float32
constexpr int PAD = 64;        // rows of scratch are whole multiples of this many elements; so are tails
typedef float V __attribute__((vector_size(VBYTES)));
typedef int32_t VI __attribute__((vector_size(VBYTES)));
typedef uint32_t VU __attribute__((vector_size(VBYTES)));
typedef uint16_t VH __attribute__((vector_size(VBYTES / 2)));

inline V splat(float a) {  // not V{} + a, which costs an addition: 0 + a is not a where a is -0
#if defined(__AVX512F__)
  return (V)_mm512_set1_ps(a);
#elif defined(__AVX2__)
  return (V)_mm256_set1_ps(a);
#elif defined(MOEOPT_NEON)
  return (V)vdupq_n_f32(a);
#else
  V v;
  for (int i = 0; i < L; i++) v[i] = a;
  return v;
#endif
}
inline V load(const float *p) { V v; memcpy(&v, p, sizeof v); return v; }
inline void store(float *p, V v) { memcpy(p, &v, sizeof v); }
inline VU bits(V v) { VU u; memcpy(&u, &v, sizeof u); return u; }
inline V as_float(VU u) { V v; memcpy(&v, &u, sizeof v); return v; }
inline V pick(VI mask, V a, V b) { return mask ? a : b; }

inline V widen_bf16(VH h) { return as_float(__builtin_convertvector(h, VU) << 16); }

inline V widen_f16(VH h) {
#if defined(__AVX512F__)
  __m256i i; memcpy(&i, &h, sizeof i); return (V)_mm512_cvtph_ps(i);
#elif defined(__F16C__)
  __m128i i; memcpy(&i, &h, sizeof i); return (V)_mm256_cvtph_ps(i);
#elif defined(MOEOPT_NEON)
  return (V)vcvt_f32_f16((float16x4_t)h);
#else
  VU u = __builtin_convertvector(h, VU), rest = (u & 0x7fff) << 13;
  VU scaled = bits(as_float(rest) * as_float(VU{} + 0x77800000u));  // times 2^112: exponents, and what is subnormal
  VU special = (VU)(rest >= 0x0f800000u) & 0x7f800000u;
  return as_float(scaled | special | ((u & 0x8000) << 16));
#endif
}

inline VU bf16_bits(V v) {  // to the nearest, ties to even; a NaN stays one
  VU u = bits(v), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, nan = (u >> 16) | 0x40;
  return (v == v) ? rounded : nan;
}

inline VU f16_bits(V v) {
#if defined(MOEOPT_NEON)
  return (VU)vmovl_u16((uint16x4_t)vcvt_f16_f32((float32x4_t)v));
#else
  VU u = bits(v), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  VU normal = (a - 0x38000000u + 0xfff + ((a >> 13) & 1)) >> 13;
  VU small = bits(as_float(a) + splat(0.5f)) - 0x3f000000u;  // below 2^-14: one unit of 0.5f is one of the result
  VU r = (a < 0x38800000u) ? small : normal;
  r = (a >= 0x477ff000u) ? VU{} + 0x7c00 : r;
  r = (a > 0x7f800000u) ? VU{} + 0x7e00 : r;
  return r | sign;
#endif
}

inline V round_to(V v, int64_t dtype) {
  if (dtype == MOEOPT_BF16) return as_float(bf16_bits(v) << 16);
  if (dtype == MOEOPT_F16) return widen_f16(__builtin_convertvector(f16_bits(v), VH));
  return v;
}

inline V load_as(const void *p, int64_t dtype, int64_t i) {  // elements i .. i + L of any dtype
  if (dtype == MOEOPT_F32) return load((const float *)p + i);
  VH h; memcpy(&h, (const uint16_t *)p + i, sizeof h);
  return dtype == MOEOPT_BF16 ? widen_bf16(h) : widen_f16(h);
}

inline void store_as(void *p, int64_t dtype, int64_t i, V v) {
  if (dtype == MOEOPT_F32) { store((float *)p + i, v); return; }
  VH h = __builtin_convertvector(dtype == MOEOPT_BF16 ? bf16_bits(v) : f16_bits(v), VH);
  memcpy((uint16_t *)p + i, &h, sizeof h);
}

inline float load_one(const void *p, int64_t dtype, int64_t i) {
  if (dtype == MOEOPT_F32) return ((const float *)p)[i];
  VH h{}; h[0] = ((const uint16_t *)p)[i];
  return (dtype == MOEOPT_BF16 ? widen_bf16(h) : widen_f16(h))[0];
}

inline void store_one(void *p, int64_t dtype, int64_t i, float a) {
  if (dtype == MOEOPT_F32) ((float *)p)[i] = a;
  else ((uint16_t *)p)[i] = (uint16_t)(dtype == MOEOPT_BF16 ? bf16_bits(splat(a)) : f16_bits(splat(a)))[0];
}

inline float round_one(float a, int64_t dtype) { return dtype == MOEOPT_F32 ? a : round_to(splat(a), dtype)[0]; }

// n < L elements, zeros behind them
inline V load_some(const void *p, int64_t dtype, int64_t i, int64_t n) {
  alignas(VBYTES) char raw[VBYTES] = {};
  int64_t size = dtype == MOEOPT_F32 ? 4 : 2;
  memcpy(raw, (const char *)p + i * size, n * size);
  return load_as(raw, dtype, 0);
}

inline void store_some(void *p, int64_t dtype, int64_t i, V v, int64_t n) {
  alignas(VBYTES) char raw[VBYTES];
  int64_t size = dtype == MOEOPT_F32 ? 4 : 2;
  store_as(raw, dtype, 0, v);
  memcpy((char *)p + i * size, raw, n * size);
}

// L numbers from i on, of which those of even places go to the first half of their 32, and those of odd ones to the second
inline void store_evens_first(float *row, int64_t i, V v) {
#if defined(__AVX512F__)
  const __m512i apart = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  const __m512 w = _mm512_permutexvar_ps(apart, (__m512)v);
  float *to = row + (i & ~31) + (i & 31) / 2;
  _mm256_storeu_ps(to, _mm512_castps512_ps256(w)), _mm256_storeu_ps(to + 16, _mm512_extractf32x8_ps(w, 1));
#else
  for (int j = 0; j < L; j++) row[((i + j) & ~31) + ((i + j) & 31) / 2 + ((i + j) & 1) * 16] = v[j];
#endif
}

inline void load_row(float *to, const void *p, int64_t dtype, int64_t stride, int64_t n) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + L <= n; i += L) store(to + i, load_as(p, dtype, i));
  }
  for (; i < n; i++) to[i] = load_one(p, dtype, i * stride);
}

// The sums of all lanes of four vectors, added to what is there or not: halves, then quarters, then (0 + 1) + (2 + 3).
inline void sum4(V a, V b, V c, V d, float *to, bool add) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  auto fold = [](V v) {
    __m256 w = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
  };
#else
  auto fold = [](V v) { return _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1)); };
#endif
  const __m128 s = _mm_hadd_ps(_mm_hadd_ps(fold(a), fold(b)), _mm_hadd_ps(fold(c), fold(d)));
  _mm_storeu_ps(to, add ? _mm_add_ps(_mm_loadu_ps(to), s) : s);
#elif defined(MOEOPT_NEON)
  auto two = [](V v, V w) { return vpaddq_f32((float32x4_t)v, (float32x4_t)w); };
  const float32x4_t s = vpaddq_f32(two(a, b), two(c, d));
  vst1q_f32(to, add ? vaddq_f32(vld1q_f32(to), s) : s);
#else
  const float s[4] = {(a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3]), (c[0] + c[1]) + (c[2] + c[3]),
                      (d[0] + d[1]) + (d[2] + d[3])};
  for (int i = 0; i < 4; i++) to[i] = add ? to[i] + s[i] : s[i];
#endif
}

}  // namespace
