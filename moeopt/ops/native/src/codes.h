// Products on quantised W: codes become floats in registers for few rows of x, else four rows of W at a time in the
// nearest cache.
//
//   W[o][i] = (code - zero) * scales[o * scale_stride + i / block]
//
// I8: zero is 0, or of bytes that have no sign (View::zs) 128; U4: zero is 8, low half of a byte first.
//
// Each weight is rounded once to float32, and once more to the compute dtype, as the reference makes it. In memory W stays
// as it is: what is read of it are its codes and scales.
#pragma once
#include "tile.h"

namespace {

inline bool is_code(int64_t dtype) { return dtype == MOEOPT_I8 || dtype == MOEOPT_U4; }

// Weights i .. i + L of a row under one scale, each (code - zero) * scale rounded once. Intrinsics: compilers take
// conversions from 8 bits apart. Decoding one token is bound by these few instructions, not by the memory that they read.
template <int ZERO>
struct CodesOf8Bits {
  typedef V Scale;
#if defined(__AVX2__)
  static __m128i to_signed(__m128i bytes) { return ZERO ? _mm_xor_si128(bytes, _mm_set1_epi8((char)0x80)) : bytes; }  // exact: less 128
#endif
  static float one(const char *row, int64_t i) { return ZERO ? (float)((int)(uint8_t)row[i] - ZERO) : (float)(int8_t)row[i]; }
  static Scale scale(float s) { return splat(s); }
  static V weights(const char *row, int64_t i, Scale scale) {
#if defined(__AVX512F__)
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(to_signed(_mm_loadu_si128((const __m128i *)(row + i))))) * scale;
#elif defined(__AVX2__)
    return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(to_signed(_mm_loadl_epi64((const __m128i *)(row + i))))) * scale;
#elif defined(MOEOPT_NEON)
    uint32_t four; memcpy(&four, row + i, 4);
    if (ZERO) four ^= 0x80808080u;
    return (V)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)))))) * scale;
#else
    V v;
    for (int j = 0; j < L; j++) v[j] = one(row, i + j);
    return v * scale;
#endif
  }
  static constexpr int64_t bytes(int64_t codes) { return codes; }
  typedef const char *Block;  // 32 codes under one scale, of which part q has L from q on
  static Block block(const char *at) { return at; }
  static V part(Block codes, int q, Scale scale) { return weights(codes, q, scale); }
};
typedef CodesOf8Bits<0> I8;
typedef CodesOf8Bits<128> U8;
struct U4 {  // i is a multiple of 8, of L on AVX-512: a lane shifts its code down, from a word that lanes share
#if defined(__AVX512F__)
  typedef __m512 Scale;  // the 16 weights that a code can stand for
  static Scale scale(float s) {
    return _mm512_mul_ps(_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_ps(s));
  }
  static V weights(const char *row, int64_t i, Scale scale) {
    int64_t eight; memcpy(&eight, row + i / 2, 8);
    const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i down = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i words = (__m512i)_mm512_permutevar_ps((__m512)_mm512_set1_epi64(eight), halves);
    return (V)_mm512_permutexvar_ps(_mm512_srlv_epi32(words, down), scale);  // which looks at four bits of an index
  }
#elif defined(__AVX2__)
  struct Scale { __m256 one, eight; };
  static Scale scale(float s) { return {_mm256_set1_ps(s), _mm256_set1_ps(-8 * s)}; }
  static V weights(const char *row, int64_t i, Scale scale) {  // code * scale - 8 * scale: exact, and rounded once
    int32_t four; memcpy(&four, row + i / 2, 4);
    const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(four), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return (V)_mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(15))), scale.one, scale.eight);
  }
#else
  typedef V Scale;
  static Scale scale(float s) { return splat(s); }
  static V weights(const char *row, int64_t i, Scale scale) {
#if defined(MOEOPT_NEON)
    uint16_t two; memcpy(&two, row + i / 2, 2);
    const int32_t down[4] = {0, -4, -8, -12};
    const uint32x4_t codes = vandq_u32(vshlq_u32(vdupq_n_u32(two), vld1q_s32(down)), vdupq_n_u32(15));
    return (V)vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(codes), vdupq_n_s32(8))) * scale;
#else
    V v;
    for (int j = 0; j < L; j += 2) {
      const uint8_t byte = (uint8_t)row[(i + j) / 2];
      v[j] = (float)((byte & 15) - 8), v[j + 1] = (float)((byte >> 4) - 8);
    }
    return v * scale;
#endif
  }
#endif
  static float one(const char *row, int64_t i) { return (float)((((uint8_t)row[i / 2] >> (i % 2 * 4)) & 15) - 8); }
  static constexpr int64_t bytes(int64_t codes) { return codes / 2; }
  typedef const char *Block;
  static Block block(const char *at) { return at; }
  static V part(Block codes, int q, Scale scale) { return weights(codes, q, scale); }
};
#if defined(__AVX512F__)
struct Evens : U4 {  // for rows of x whose even numbers come first: the codes of a byte go to the same lane of two parts, not side by side
  typedef __m512i Block;
  static Block block(const char *at) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at)); }
  static V part(Block bytes, int q, Scale scale) {
    return (V)_mm512_permutexvar_ps(q ? _mm512_srli_epi32(bytes, 4) : bytes, scale);
  }
};
#endif

inline float scale_at(const View &v, int64_t o, int64_t block) {
  const int64_t at = o * v.ss + block;
  if (v.scale_dtype == MOEOPT_F32) return ((const float *)v.scales)[at];
  if (v.scale_dtype == MOEOPT_F16) return load_one(v.scales, v.scale_dtype, at);
  const uint32_t wide = (uint32_t)((const uint16_t *)v.scales)[at] << 16;
  float scale; memcpy(&scale, &wide, sizeof scale);
  return scale;
}

// the scales of row o from block `first` on, as floats
inline void scales_of_row(float *to, const View &v, int64_t o, int64_t first, int64_t count) {
  int64_t b = 0;
  for (; b + L <= count; b += L) store(to + b, load_as(v.scales, v.scale_dtype, o * v.ss + first + b));
  for (; b < count; b++) to[b] = scale_at(v, o, first + b);
}

// weights k .. k + n of row o as floats
template <class C>
inline void row_of_codes(float *to, const View &v, int64_t o, int64_t k, int64_t n, int64_t compute) {
  const char *row = (const char *)v.data + C::bytes(o * v.so);
  for (int64_t i = 0; i < n;) {
    const int64_t block = (k + i) / v.block, end = smaller(n, (block + 1) * v.block - k);
    const float scale = scale_at(v, o, block);
    const typename C::Scale held = C::scale(scale);
    for (; i + L <= end && !((k + i) & 7); i += L) {
      const V w = C::weights(row, k + i, held);
      store(to + i, compute == MOEOPT_F32 ? w : round_to(w, compute));
    }
    for (; i < end; i++) to[i] = round_one(C::one(row, k + i) * scale, compute);
  }
}

// The same to float32, where a row is whole blocks of BLOCK: what stands around a block of a few vectors took as long as they do.
template <class C, int BLOCK>
inline void row_of_blocks(float *to, const View &v, int64_t o, int64_t k, int64_t n) {
  const char *row = (const char *)v.data + C::bytes(o * v.so + k);
  float scales[DOT_CHUNK / BLOCK];
  scales_of_row(scales, v, o, k / BLOCK, n / BLOCK);
  for (int64_t b = 0; b < n / BLOCK; b++) {
    const typename C::Scale scale = C::scale(scales[b]);
    const typename C::Block codes = C::block(row + b * C::bytes(BLOCK));
    UNROLL for (int q = 0; q < BLOCK; q += L) store(to + b * BLOCK + q, C::part(codes, q, scale));
  }
}

// NW rows of codes times NX rows of x, each code made float in a register: no panel is written. Blocks are whole vectors.
// The NW rows behind these are fetched meanwhile, a cache line at a time.
template <class C, int NW, int NX>
inline void codes_tile(const View &v, const int64_t *row, int64_t k, int64_t n, const float *x, int64_t ldx, float *to, int64_t ldt, bool add) {
  V acc[NX][NW];
  UNROLL for (int i = 0; i < NX; i++)
    UNROLL for (int j = 0; j < NW; j++) acc[i][j] = V{};
  const char *w[NW];
  UNROLL for (int j = 0; j < NW; j++) w[j] = (const char *)v.data + C::bytes(row[j] * v.so);
  const int64_t ahead = C::bytes(NW * v.so), block = k / v.block;
  float scales[NW][DOT_CHUNK / L + 1];  // a block is L codes or more, and may begin before k
  UNROLL for (int j = 0; j < NW; j++) scales_of_row(scales[j], v, row[j], block, (k + n - 1) / v.block - block + 1);
  int64_t fetched = 0, end = (block + 1) * v.block - k;
  for (int64_t i = 0, b = 0; i < n; b++, end += v.block) {
    typename C::Scale scale[NW];
    UNROLL for (int j = 0; j < NW; j++) scale[j] = C::scale(scales[j][b]);
    const int64_t stop = smaller(n, end);
    for (; i + L <= stop; i += L) {
      if (C::bytes(i) >= fetched) {
        UNROLL for (int j = 0; j < NW; j++) __builtin_prefetch(w[j] + ahead + C::bytes(k + i), 0, 2);
        fetched += 64;
      }
      V values[NX];
      UNROLL for (int m = 0; m < NX; m++) values[m] = load(x + m * ldx + i);
      UNROLL for (int j = 0; j < NW; j++) {
        const V a = C::weights(w[j], k + i, scale[j]);
        UNROLL for (int m = 0; m < NX; m++) acc[m][j] += a * values[m];
      }
    }
    if (i < stop) {  // the last of a row
      UNROLL for (int j = 0; j < NW; j++) {
        V a{};
        for (int64_t c = i; c < stop; c++) a[c - i] = C::one(w[j], k + c) * scales[j][b];
        UNROLL for (int m = 0; m < NX; m++) acc[m][j] += a * load(x + m * ldx + i);  // x has zeros behind its end
      }
      i = stop;
    }
  }
  UNROLL for (int m = 0; m < NX; m++) finish(acc[m], to + m * ldt, add);
}

// The same, to the same bits, where each row is whole blocks of BLOCK: a block is a few vectors, and takes less time than what would
// stand around them if its size were not known here.
template <class C, int BLOCK, int NW, int NX>
inline void blocks_tile(const View &v, const int64_t *row, int64_t k, int64_t n, const float *x, int64_t ldx, float *to, int64_t ldt, bool add) {
  constexpr int64_t bytes = C::bytes(BLOCK);
  V acc[NX][NW];
  UNROLL for (int i = 0; i < NX; i++)
    UNROLL for (int j = 0; j < NW; j++) acc[i][j] = V{};
  const char *w[NW];
  UNROLL for (int j = 0; j < NW; j++) w[j] = (const char *)v.data + C::bytes(row[j] * v.so + k);
  const int64_t ahead = C::bytes(NW * v.so), count = n / BLOCK;
  float scales[NW][DOT_CHUNK / BLOCK];
  UNROLL for (int j = 0; j < NW; j++) scales_of_row(scales[j], v, row[j], k / BLOCK, count);
  for (int64_t b = 0; b < count; b++) {
    if (b % (64 / bytes) == 0) {
      UNROLL for (int j = 0; j < NW; j++) __builtin_prefetch(w[j] + ahead + b * bytes, 0, 2);
    }
    typename C::Scale scale[NW];
    typename C::Block codes[NW];
    UNROLL for (int j = 0; j < NW; j++) scale[j] = C::scale(scales[j][b]), codes[j] = C::block(w[j] + b * bytes);
    UNROLL for (int q = 0; q < BLOCK; q += L) {
      V values[NX];
      UNROLL for (int m = 0; m < NX; m++) values[m] = load(x + m * ldx + b * BLOCK + q);
      UNROLL for (int j = 0; j < NW; j++) {
        const V a = C::part(codes[j], q, scale[j]);
        UNROLL for (int m = 0; m < NX; m++) acc[m][j] += a * values[m];
      }
    }
  }
  UNROLL for (int m = 0; m < NX; m++) finish(acc[m], to + m * ldt, add);
}

template <class C, int BLOCK, int NW, int NX>
inline void some_codes(const View &v, const int64_t *row, int64_t k, int64_t n, const float *x, int64_t ldx, float *to, int64_t ldt, bool add) {
  if constexpr (BLOCK > 0) blocks_tile<C, BLOCK, NW, NX>(v, row, k, n, x, ldx, to, ldt, add);
  else codes_tile<C, NW, NX>(v, row, k, n, x, ldx, to, ldt, add);
}

// rows of x up to which codes become floats in registers, and beyond it in a panel: as many as leave the sums there
constexpr int64_t FEW_CODES = MANY_REGISTERS ? 6 : 3;

template <class C, int BLOCK>
void some_rows(const View &v, const int64_t *row, int64_t k, int64_t n, const float *x, int64_t ldx, int64_t M, float *to, int64_t ldt, bool add) {
  switch (M) {
    case 6: some_codes<C, BLOCK, 4, FEW_CODES < 6 ? 1 : 6>(v, row, k, n, x, ldx, to, ldt, add); return;
    case 5: some_codes<C, BLOCK, 4, FEW_CODES < 6 ? 1 : 5>(v, row, k, n, x, ldx, to, ldt, add); return;
    case 4: some_codes<C, BLOCK, 4, FEW_CODES < 6 ? 1 : 4>(v, row, k, n, x, ldx, to, ldt, add); return;
    case 3: some_codes<C, BLOCK, 4, 3>(v, row, k, n, x, ldx, to, ldt, add); return;
    case 2: some_codes<C, BLOCK, 4, 2>(v, row, k, n, x, ldx, to, ldt, add); return;
    default: some_codes<C, BLOCK, 4, 1>(v, row, k, n, x, ldx, to, ldt, add); return;
  }
}

// BLOCK: the size of v's blocks, of which K is a multiple; 0: any size
template <class C, int BLOCK>
void dot_codes_direct(const View &v, int64_t first, int64_t n, const float *x, int64_t ldx, int64_t K, int64_t M, float *to, int64_t ldt) {
  const int64_t chunk = chunk_of(K, DOT_CHUNK);
  for (int64_t k = 0; k < K; k += chunk) {
    const int64_t kc = smaller(chunk, K - k);
    for (int64_t j = 0; j < n;) {
      int64_t row[8];
      for (int i = 0; i < 8; i++) row[i] = first + smaller(j + i, n - 1);
      if (M == 1 && j + 8 <= n && (BLOCK == 0 || MANY_REGISTERS)) {  // else registers are too few for eight rows and their scales
        some_codes<C, BLOCK, 8, 1>(v, row, k, kc, x + k, ldx, to + j, ldt, k > 0), j += 8;
        continue;
      }
      some_rows<C, BLOCK>(v, row, k, kc, x + k, ldx, M, to + j, ldt, k > 0);
      j += 4;
    }
  }
}

template <class C>
void dot_codes_of(const View &v, int64_t compute, int64_t first, int64_t n, const float *x, int64_t ldx, int64_t K, int64_t M,
                  float *to, int64_t ldt, float *panel) {
  const bool blocks = v.block == 32 && K % 32 == 0, plain = compute == MOEOPT_F32;
  if (M <= FEW_CODES && plain && (v.block % L == 0 || v.block >= K)) {
    if (blocks) return dot_codes_direct<C, 32>(v, first, n, x, ldx, K, M, to, ldt);
    return dot_codes_direct<C, 0>(v, first, n, x, ldx, K, M, to, ldt);
  }
  const int64_t chunk = chunk_of(K, DOT_CHUNK), ld = chunk + 16;
  const float *w[4] = {panel, panel + ld, panel + 2 * ld, panel + 3 * ld};
  for (int64_t k = 0; k < K; k += chunk) {
    const int64_t kc = smaller(chunk, K - k);
    for (int64_t j = 0; j < n; j += 4) {
      for (int i = 0; i < 4; i++) {
        const int64_t row = first + smaller(j + i, n - 1);
        const char *codes = (const char *)v.data + C::bytes((row + 4) * v.so + k);  // the next rows, fetched meanwhile
        for (int64_t c = 0; c < C::bytes(kc); c += 64) __builtin_prefetch(codes + c, 0, 2);
        if (blocks && plain) row_of_blocks<C, 32>(panel + i * ld, v, row, k, kc);
        else row_of_codes<C>(panel + i * ld, v, row, k, kc, compute);
      }
      dot_rows<F32, 4>(w, 0, x + k, ldx, kc, M, to + j, ldt, k > 0);
    }
  }
}

void dot_codes(const View &v, int64_t compute, int64_t first, int64_t n, const float *x, int64_t ldx, int64_t K, int64_t M,
               float *to, int64_t ldt, float *panel) {
#if defined(__AVX512F__)
  if (v.evens) return dot_codes_of<Evens>(v, compute, first, n, x, ldx, K, M, to, ldt, panel);
#endif
  const auto of = v.dtype != MOEOPT_I8 ? dot_codes_of<U4> : v.zs ? dot_codes_of<U8> : dot_codes_of<I8>;
  of(v, compute, first, n, x, ldx, K, M, to, ldt, panel);
}

}  // namespace
