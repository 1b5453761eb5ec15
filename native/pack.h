// Rows transposed in bf16 pairs, so that one lane is one row: what a kernel needs that keeps its sums in lanes.
#pragma once

#include "vector.h"

namespace {

// W rows of W 32-bit values each, transposed.
#if FH_512
FH_INLINE void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // r[4q + i]: columns i, 4+i, 8+i, 12+i of rows 4q..4q+3
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88), d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
FH_INLINE void store_bits(void* p, B x) { _mm512_storeu_si512(p, x); }
#else
FH_INLINE void transpose(__m256i* r) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
FH_INLINE void store_bits(void* p, B x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
#endif

// packed[d / 2] ← pair d of W rows; successive pairs are `stride` values apart. Past an odd end there is a 0.
FH_INLINE void pack_rows(const bf16* const* rows, int64_t size, bf16* packed, int64_t stride) {
  for (int64_t d = 0; d < size; d += 2 * W) {
    const int64_t n = min64(2 * W, size - d);
    B r[W];
    if (n == 2 * W) {
      for (int k = 0; k < W; ++k) r[k] = load(rows[k] + d);
    } else {
      for (int k = 0; k < W; ++k) r[k] = load(rows[k] + d, n);
    }
    transpose(r);
    bf16* out = packed + d / 2 * stride;
    if (n == 2 * W) {
      for (int i = 0; i < W; ++i) store_bits(out + i * stride, r[i]);
    } else {
      for (int64_t i = 0; i < (n + 1) / 2; ++i) store_bits(out + i * stride, r[i]);
    }
  }
}

}  // namespace
