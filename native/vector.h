// The instruction set behind one small vocabulary, so that every kernel is written once.
//
// Included by kernels.cpp only, which is compiled once per instruction set with its own flags and FH_ISA_* macro.
// Everything here is in an unnamed namespace: a shared inline function compiled with AVX-512 must never be the copy
// the linker keeps for AVX2 callers. For the same reason no standard library templates are used in kernels.
//
//   F   W fp32 lanes.        B   2·W bf16 values, as pairs (low half first) in the lanes of an F.
//
// dp(acc, a, b) adds a.low·b.low + a.high·b.high to each lane. With AVX-512-BF16 it is one instruction, which treats
// denormal inputs as zero and rounds its two additions itself: equal to fp32 accumulation within fp32 rounding.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(FH_ISA_AVX512BF16)
#define FH_ISA avx512bf16
#define FH_512 1
#elif defined(FH_ISA_AVX512)
#define FH_ISA avx512
#define FH_512 1
#elif defined(FH_ISA_AVX2)
#define FH_ISA avx2
#define FH_512 0
#else
#error "define one of FH_ISA_AVX2, FH_ISA_AVX512, FH_ISA_AVX512BF16"
#endif

#define FH_INLINE static inline __attribute__((always_inline))

namespace {

using bf16 = uint16_t;

FH_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

FH_INLINE float widen(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; a NaN stays a (quiet) NaN.
FH_INLINE bf16 narrow(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16((u >> 16) | 0x40);
  return bf16((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

FH_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
FH_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

template <int N>
struct Count {
  static constexpr int value = N;
};

#if FH_512

constexpr int W = 16;
using F = __m512;
using B = __m512i;
using Mask = __mmask16;

FH_INLINE F zero() { return _mm512_setzero_ps(); }
FH_INLINE F all(float x) { return _mm512_set1_ps(x); }
FH_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
FH_INLINE F load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(Mask((1u << n) - 1), p); }
FH_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
FH_INLINE void store(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, Mask((1u << n) - 1), x); }
FH_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
FH_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
FH_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
FH_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
FH_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// Returns b where either is NaN.
FH_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
FH_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
FH_INLINE F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FH_INLINE F pow2(F n) {  // 2^n for integers n in [-126, 127]
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
FH_INLINE B load(const bf16* p) { return _mm512_loadu_si512(p); }
FH_INLINE B load(const bf16* p, int64_t n) { return _mm512_maskz_loadu_epi16(__mmask32((1ull << n) - 1), p); }
FH_INLINE B pair(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
FH_INLINE B low_pairs(B a, B b) { return _mm512_unpacklo_epi16(a, b); }
FH_INLINE B high_pairs(B a, B b) { return _mm512_unpackhi_epi16(a, b); }
FH_INLINE F even(B x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
FH_INLINE F odd(B x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u)))); }
FH_INLINE F widen(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
FH_INLINE F widen(const bf16* p, int64_t n) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(Mask((1u << n) - 1), p)), 16));
}
FH_INLINE __m256i rounded(F x) {
  __m512i u = _mm512_castps_si512(x);
  __m512i bit = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), bit);
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
FH_INLINE void narrow(bf16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(x)); }
FH_INLINE void narrow(bf16* p, F x, int64_t n) { _mm256_mask_storeu_epi16(p, Mask((1u << n) - 1), rounded(x)); }

FH_INLINE F dp(F acc, B a, B b) {
#if defined(FH_ISA_AVX512BF16)
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
  return fma(even(a), even(b), fma(odd(a), odd(b), acc));
#endif
}

FH_INLINE __m128 fold(F x) {  // the four 128-bit parts, summed
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
FH_INLINE __m128 sum4(F a, F b, F c, F d) {  // (Σa, Σb, Σc, Σd)
  F ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  F cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return fold(add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee)));
}
// Lanes of low_pairs/high_pairs order → 2·W consecutive values.
FH_INLINE void consecutive(F low, F high, F* first, F* second) {
  F a = _mm512_shuffle_f32x4(low, high, 0x44), b = _mm512_shuffle_f32x4(low, high, 0xee);  // l0 l1 h0 h1 | l2 l3 h2 h3
  *first = _mm512_shuffle_f32x4(a, a, 0xd8);
  *second = _mm512_shuffle_f32x4(b, b, 0xd8);
}

#else

constexpr int W = 8;
using F = __m256;
using B = __m256i;

FH_INLINE F zero() { return _mm256_setzero_ps(); }
FH_INLINE F all(float x) { return _mm256_set1_ps(x); }
FH_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
FH_INLINE F load(const float* p, int64_t n) {
  alignas(32) float t[8] = {};
  memcpy(t, p, size_t(n) * 4);
  return _mm256_load_ps(t);
}
FH_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
FH_INLINE void store(float* p, F x, int64_t n) {
  alignas(32) float t[8];
  _mm256_store_ps(t, x);
  memcpy(p, t, size_t(n) * 4);
}
FH_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
FH_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
FH_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
FH_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
FH_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
FH_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
FH_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
FH_INLINE F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FH_INLINE F pow2(F n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
FH_INLINE B load(const bf16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
FH_INLINE B load(const bf16* p, int64_t n) {
  alignas(32) bf16 t[16] = {};
  memcpy(t, p, size_t(n) * 2);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(t));
}
FH_INLINE B pair(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}
FH_INLINE B low_pairs(B a, B b) { return _mm256_unpacklo_epi16(a, b); }
FH_INLINE B high_pairs(B a, B b) { return _mm256_unpackhi_epi16(a, b); }
FH_INLINE F even(B x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
FH_INLINE F odd(B x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000u)))); }
FH_INLINE F widen(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
FH_INLINE F widen(const bf16* p, int64_t n) {
  alignas(16) bf16 t[8] = {};
  memcpy(t, p, size_t(n) * 2);
  return widen(t);
}
FH_INLINE __m128i rounded(F x) {
  __m256i u = _mm256_castps_si256(x);
  __m256i bit = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), bit);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  r = _mm256_srli_epi32(_mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
FH_INLINE void narrow(bf16* p, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rounded(x)); }
FH_INLINE void narrow(bf16* p, F x, int64_t n) {
  alignas(16) bf16 t[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(t), rounded(x));
  memcpy(p, t, size_t(n) * 2);
}

FH_INLINE F dp(F acc, B a, B b) { return fma(even(a), even(b), fma(odd(a), odd(b), acc)); }

FH_INLINE __m128 fold(F x) { return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); }
FH_INLINE __m128 sum4(F a, F b, F c, F d) {
  F ab = add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  F cd = add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  return fold(add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee)));
}
FH_INLINE void consecutive(F low, F high, F* first, F* second) {
  *first = _mm256_permute2f128_ps(low, high, 0x20);
  *second = _mm256_permute2f128_ps(low, high, 0x31);
}

#endif

FH_INLINE float sum(F x) {
  __m128 s = fold(x);
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

FH_INLINE float largest(F x) {  // of lanes without NaN
#if FH_512
  return _mm512_reduce_max_ps(x);
#else
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
#endif
}

// x rounded to bf16 precision, as fp32; a NaN stays one.
FH_INLINE F round_bf16(F x) {
#if FH_512
  const __m512i u = _mm512_castps_si512(x), bit = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_and_si512(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), bit),
                                     _mm512_set1_epi32(int(0xffff0000u)));
  return _mm512_mask_mov_ps(_mm512_castsi512_ps(r), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
#else
  const __m256i u = _mm256_castps_si256(x), bit = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_and_si256(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), bit),
                                     _mm256_set1_epi32(int(0xffff0000u)));
  return _mm256_blendv_ps(_mm256_castsi256_ps(r), x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
#endif
}

// Four fp32 → four bf16, rounded to nearest even.
FH_INLINE void narrow4(bf16* p, __m128 x) {
  __m128i u = _mm_castps_si128(x);
  __m128i bit = _mm_and_si128(_mm_srli_epi32(u, 16), _mm_set1_epi32(1));
  __m128i r = _mm_add_epi32(_mm_add_epi32(u, _mm_set1_epi32(0x7fff)), bit);
  __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(x, x));
  r = _mm_srli_epi32(_mm_blendv_epi8(r, _mm_or_si128(u, _mm_set1_epi32(0x400000)), nan), 16);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(r, r));
}

// The first n lanes, n ≥ 1; the others are 0.
FH_INLINE F lanes_of(const float* p, int64_t n) { return load(p, min64(W, n)); }
FH_INLINE F lanes_of(const bf16* p, int64_t n) { return widen(p, min64(W, n)); }
// The first n lanes, n ≥ 1.
FH_INLINE void put_lanes(float* p, F v, int64_t n) { n >= W ? store(p, v) : store(p, v, n); }
FH_INLINE void put_lanes(bf16* p, F v, int64_t n) { n >= W ? narrow(p, v) : narrow(p, v, n); }

// e^x within 2 ulp for every x: 0 below the smallest normal's logarithm, +inf above the largest's, NaN for NaN.
// Source: range reduction by ln 2 in two parts (Cody and Waite 1980), Taylor polynomial of degree 7 on ±ln2/2.
FH_INLINE F exp(F x) {
  F clamped = min(all(88.7228391f), max(all(-87.3365447f), x));
  F n = round(mul(clamped, all(1.44269504088896341f)));
  F r = fma(n, all(-0.693359375f), clamped);
  r = fma(n, all(2.12194440e-4f), r);
  F p = all(1.9841270e-4f);
  p = fma(p, r, all(1.3888889e-3f));
  p = fma(p, r, all(8.3333333e-3f));
  p = fma(p, r, all(4.1666667e-2f));
  p = fma(p, r, all(1.6666667e-1f));
  p = fma(p, r, all(0.5f));
  p = fma(p, r, all(1.0f));
  p = fma(p, r, all(1.0f));
  // 2^n in two factors, because n reaches 128.
  F half = round(mul(n, all(0.5f)));
  F y = mul(mul(p, pow2(half)), pow2(sub(n, half)));
#if FH_512
  y = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, all(-87.3365447f), _CMP_NLT_UQ), y);
  y = _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, all(88.7228391f), _CMP_GT_OQ), all(__builtin_inff()));
  return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
#else
  y = _mm256_and_ps(y, _mm256_cmp_ps(x, all(-87.3365447f), _CMP_NLT_UQ));
  y = _mm256_blendv_ps(y, all(__builtin_inff()), _mm256_cmp_ps(x, all(88.7228391f), _CMP_GT_OQ));
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
#endif
}

// x · sigmoid(x), and the sigmoid.
FH_INLINE F sigmoid(F x) { return div(all(1.0f), add(all(1.0f), exp(sub(zero(), x)))); }
FH_INLINE F silu(F x) { return div(x, add(all(1.0f), exp(sub(zero(), x)))); }

FH_INLINE float exp1(float x) {
  float t[W];
  store(t, exp(all(x)));
  return t[0];
}

}  // namespace
