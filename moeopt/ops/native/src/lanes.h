// Vectors of four parts of 16 bytes, and how numbers of 32 bits change places in them: AVX-512.
#pragma once
#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>

namespace {

// four by four numbers of 32 bits, in each of the four parts of vectors
inline void turn4(__m512i (&r)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
  const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
  r[0] = _mm512_unpacklo_epi64(a, c), r[1] = _mm512_unpackhi_epi64(a, c), r[2] = _mm512_unpacklo_epi64(b, d), r[3] = _mm512_unpackhi_epi64(b, d);
}

// four by four parts of vectors
inline void turn4_parts(__m512i (&r)[4]) {
  const __m512i a = _mm512_shuffle_i32x4(r[0], r[1], 0x44), b = _mm512_shuffle_i32x4(r[0], r[1], 0xee);
  const __m512i c = _mm512_shuffle_i32x4(r[2], r[3], 0x44), d = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
  r[0] = _mm512_shuffle_i32x4(a, c, 0x88), r[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  r[2] = _mm512_shuffle_i32x4(b, d, 0x88), r[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

#if defined(__AVX512BW__)
inline __m512i pair_order(int from) {  // 0 32 1 33 ...: element `from` + c of both of two rows of 16 bits
  alignas(64) uint16_t order[32];
  for (int c = 0; c < 32; c++) order[c] = (uint16_t)(from + c / 2 + c % 2 * 32);
  return _mm512_load_si512(order);
}
#endif

}  // namespace

#endif
