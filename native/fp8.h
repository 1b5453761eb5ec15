// FP8 E4M3 (1 sign, 4 exponent, 3 mantissa bits, bias 7, no infinities): weights, index keys with one scale each, and
// latents with a scale for each 128 values.
//
// Every E4M3 value is a normal bf16 number or zero, so widening is exact, and no denormal is left for AVX-512-BF16 to
// take for zero. Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning".
#pragma once

#include "pack.h"

namespace {

// With the byte sign-extended to 16 bits, sign and magnitude move to bf16's places in one shift and a mask.
// What is then to be added is the difference of the biases, (127 - 7) << 7, and below 2^-6 what normalising changes.
// E4M3's NaN occurs in weights only: a key or latent that is not finite has a scale that says so. Where a power of two
// multiplies, it is added to the exponents of both, but for zero's.
constexpr int kBias = 120 << 7;
#define FH_FP8_SUBNORMALS \
  0, 0x3b00 - 0x10, 0x3b80 - 0x20, 0x3bc0 - 0x30, 0x3c00 - 0x40, 0x3c20 - 0x50, 0x3c40 - 0x60, 0x3c60 - 0x70

// The power of two of a scale that is one.
FH_INLINE int exponent_of(float scale) {
  uint32_t u;
  memcpy(&u, &scale, 4);
  return int(u >> 23) - 127;
}
FH_INLINE void fill_nan(int64_t size, bf16* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = 0x7fc0;
}

#if FH_512
FH_INLINE __m512i subnormals_fp8() { return _mm512_broadcast_i32x4(_mm_setr_epi16(FH_FP8_SUBNORMALS)); }
FH_INLINE B widen_fp8(__m512i x, __m512i bias, __m512i table) {
  const __m512i placed = _mm512_and_si512(_mm512_slli_epi16(x, 4), _mm512_set1_epi16(short(0x87f0)));
  const __mmask32 small = _mm512_testn_epi16_mask(x, _mm512_set1_epi16(0x78));
  // The index is taken modulo 32, and the table repeats after 8.
  return _mm512_add_epi16(placed, _mm512_mask_permutexvar_epi16(bias, small, x, table));
}
template <bool MayBeNan>
FH_INLINE B widen_fp8(__m256i bytes) {
  const __m512i x = _mm512_cvtepi8_epi16(bytes);
  const __m512i value = widen_fp8(x, _mm512_set1_epi16(kBias), subnormals_fp8());
  if constexpr (!MayBeNan) return value;
  const __m512i magnitude = _mm512_set1_epi16(0x7f);
  const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, magnitude), magnitude);
  return _mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7fc0));
}
// out ← size values; reads and writes nothing beyond.
FH_INLINE void widen_fp8(const uint8_t* p, int64_t size, bf16* out) {
  int64_t i = 0;
  for (; i + 32 <= size; i += 32)
    _mm512_storeu_si512(out + i, widen_fp8<false>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i))));
  if (i < size) {
    const __mmask32 mask = __mmask32((1ull << (size - i)) - 1);
    _mm512_mask_storeu_epi16(out + i, mask, widen_fp8<false>(_mm256_maskz_loadu_epi8(mask, p + i)));
  }
}
// The same times a scale: a power of two from 2^-117 on, so that no result is denormal, or NaN.
FH_INLINE void widen_fp8(const uint8_t* p, int64_t size, float scale, bf16* out) {
  if (scale != scale) return fill_nan(size, out);
  const short shift = short(exponent_of(scale) * 128);
  const __m512i bias = _mm512_set1_epi16(short(kBias + shift)), zeros = subnormals_fp8();
  const __m512i table = _mm512_mask_add_epi16(zeros, 0xfefefefeu, zeros, _mm512_set1_epi16(shift));
  const auto whole = [&](int64_t i) __attribute__((always_inline)) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
    _mm512_storeu_si512(out + i, widen_fp8(_mm512_cvtepi8_epi16(bytes), bias, table));
  };
  if (size == 128) return whole(0), whole(32), whole(64), whole(96);
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) whole(i);
  if (i < size) {
    const __mmask32 mask = __mmask32((1ull << (size - i)) - 1);
    const __m256i bytes = _mm256_maskz_loadu_epi8(mask, p + i);
    _mm512_mask_storeu_epi16(out + i, mask, widen_fp8(_mm512_cvtepi8_epi16(bytes), bias, table));
  }
}
#else
// Bytes 2m and 2m + 1 of the table are of number m, for both halves of a lane.
FH_INLINE __m256i subnormals_fp8() { return _mm256_broadcastsi128_si256(_mm_setr_epi16(FH_FP8_SUBNORMALS)); }
FH_INLINE B widen_fp8(__m256i x, __m256i magnitude, __m256i bias, __m256i table) {
  const __m256i placed = _mm256_and_si256(_mm256_slli_epi16(x, 4), _mm256_set1_epi16(short(0x87f0)));
  const __m256i twice = _mm256_slli_epi16(magnitude, 1);
  const __m256i at = _mm256_or_si256(twice, _mm256_slli_epi16(_mm256_add_epi16(twice, _mm256_set1_epi16(1)), 8));
  const __m256i small = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), magnitude);
  return _mm256_add_epi16(placed, _mm256_blendv_epi8(bias, _mm256_shuffle_epi8(table, at), small));
}
template <bool MayBeNan>
FH_INLINE B widen_fp8(__m128i bytes) {
  const __m256i x = _mm256_cvtepi8_epi16(bytes), magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
  const __m256i value = widen_fp8(x, magnitude, _mm256_set1_epi16(kBias), subnormals_fp8());
  if constexpr (!MayBeNan) return value;
  const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
  return _mm256_blendv_epi8(value, _mm256_set1_epi16(0x7fc0), nan);
}
FH_INLINE void widen_fp8(const uint8_t* p, int64_t size, bf16* out) {
  int64_t i = 0;
  for (; i + 16 <= size; i += 16)
    store_bits(out + i, widen_fp8<false>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
  if (i < size) {
    alignas(16) uint8_t bytes[16] = {};
    alignas(32) bf16 values[16];
    memcpy(bytes, p + i, size_t(size - i));
    store_bits(values, widen_fp8<false>(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes))));
    memcpy(out + i, values, size_t(size - i) * 2);
  }
}
FH_INLINE void widen_fp8(const uint8_t* p, int64_t size, float scale, bf16* out) {
  if (scale != scale) return fill_nan(size, out);
  const __m256i shift = _mm256_set1_epi16(short(exponent_of(scale) * 128)), zeros = subnormals_fp8();
  const __m256i but_zero = _mm256_broadcastsi128_si256(_mm_setr_epi16(0, -1, -1, -1, -1, -1, -1, -1));
  const __m256i bias = _mm256_add_epi16(_mm256_set1_epi16(kBias), shift);
  const __m256i table = _mm256_add_epi16(zeros, _mm256_and_si256(shift, but_zero));
  const auto widened = [&](__m128i bytes) __attribute__((always_inline)) {
    const __m256i x = _mm256_cvtepi8_epi16(bytes);
    return widen_fp8(x, _mm256_and_si256(x, _mm256_set1_epi16(0x7f)), bias, table);
  };
  int64_t i = 0;
  for (; i + 16 <= size; i += 16)
    store_bits(out + i, widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
  if (i < size) {
    alignas(16) uint8_t bytes[16] = {};
    alignas(32) bf16 values[16];
    memcpy(bytes, p + i, size_t(size - i));
    store_bits(values, widened(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes))));
    memcpy(out + i, values, size_t(size - i) * 2);
  }
}
#endif
#undef FH_FP8_SUBNORMALS

// |x| ≤ 448 to the nearest E4M3, to even on ties.
FH_INLINE uint8_t narrow_fp8(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = u >> 24 & 0x80u, magnitude = u & 0x7fffffffu;
  float a;
  memcpy(&a, &magnitude, 4);
  if (magnitude < uint32_t(127 - 6) << 23) {  // a multiple of 2^-9: adding 2^14 rounds to one
    a += 16384.0f;
    memcpy(&u, &a, 4);
    return uint8_t(sign | (u & 0xfu));
  }
  return uint8_t(sign | (((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3)));
}

// out ← x divided by the least power of two, from 2^least on, that brings it within E4M3's 448; returns that power: 1 if
// all are zero, NaN (and zeros stored) if one is not finite. least ≥ -126.
float quantise(const bf16* x, int64_t size, int least, uint8_t* out) {
  uint32_t most = 0;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t magnitude = x[i] & 0x7fffu;
    most = magnitude > most ? magnitude : most;
  }
  if (most == 0 || most >= 0x7f80u) {
    for (int64_t i = 0; i < size; ++i) out[i] = 0;
    return most == 0 ? 1.0f : __builtin_nanf("");
  }
  // 448 = 1.75 · 2^8.
  int exponent = int(most >> 7) - 127 - 8 + ((most & 0x7fu) > 0x60u);
  if (exponent < least) exponent = least;
  const uint32_t inverse_bits = uint32_t(127 - exponent) << 23, scale_bits = uint32_t(127 + exponent) << 23;
  float inverse, scale;
  memcpy(&inverse, &inverse_bits, 4);
  memcpy(&scale, &scale_bits, 4);
  for (int64_t i = 0; i < size; ++i) out[i] = narrow_fp8(widen(x[i]) * inverse);
  return scale;
}

FH_INLINE void widen_record(const uint8_t* record, int64_t rank, int64_t rope, bf16* out) {
  const freehold::LatentRecord layout{rank, rope};
  for (int64_t i = 0; i < rank; i += freehold::kLatentGroup) {
    float scale;
    memcpy(&scale, record + layout.scale(i / freehold::kLatentGroup), 4);
    const int64_t left = rank - i;
    widen_fp8(record + i, left < freehold::kLatentGroup ? left : freehold::kLatentGroup, scale, out + i);
  }
  const bf16* key = reinterpret_cast<const bf16*>(record + layout.key());
  int64_t i = 0;
  for (; i + 2 * W <= rope; i += 2 * W) store_bits(out + rank + i, load(key + i));
  memcpy(out + rank + i, key + i, size_t(rope - i) * 2);
}

void widen_latent(const uint8_t* record, int64_t rank, int64_t rope, bf16* out) {
  widen_record(record, rank, rope, out);
}

}  // namespace
