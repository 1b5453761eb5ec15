// Products with packed weights: bf16, int8, int4 and FP8 matrices in panels of 16 outputs (layout: matrix.h).
//
// One lane is one output, so a panel is read from memory as one stream, an input pair is broadcast to all lanes, and
// nothing is summed across lanes. Codes become bf16, which holds every one of them exactly; a group's sum is then
// multiplied by its scale in fp32. Each output has two accumulators, for the even and the odd input pairs of a group,
// which are added at the group's end: an order that depends on neither the number of rows nor the panels beside it.
#pragma once

#include "fp8.h"
#include "kernels.h"

namespace {

using freehold::kChunk;
using freehold::kPanel;
using freehold::Kind;
using freehold::Matrix;

constexpr int kParts = int(kPanel) / W;      // vectors of a panel
constexpr int kPairs = int(kChunk) / 2;      // input pairs of a chunk
constexpr int kPanelRows = FH_512 ? 8 : 2;   // input rows that share one decoding of the weights

template <Kind K>
constexpr int64_t kChunkBytes = kPanel * kChunk * (K == Kind::kBf16 ? 16 : K == Kind::kInt4 ? 4 : 8) / 8;

// How far ahead weights are asked for, in bytes.
constexpr int64_t kAhead = 1024;

template <Kind K>
struct KindOf {
  static constexpr Kind value = K;
};

// ---- codes → bf16 ---------------------------------------------------------------------------------------------------

// -8 .. 7 as bf16, twice: a lookup by the low five bits of a word need not clear the fifth.
struct Int4Table {
  alignas(64) bf16 values[32];
  constexpr Int4Table() : values() {
    constexpr bf16 of[16] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                             0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    for (int i = 0; i < 32; ++i) values[i] = of[i & 15];
  }
};
constexpr Int4Table kInt4{};

#if FH_512
struct Tables {  // of int4: the sixteen values
  __m512i a;
};
template <Kind K>
FH_INLINE Tables tables() {
  if constexpr (K == Kind::kInt4) {
    const __m512i values = _mm512_load_si512(kInt4.values);
    return {values};
  } else {
    return Tables();
  }
}

FH_INLINE B from_int8(const uint8_t* p) {
  const __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)));
#if defined(FH_ISA_AVX512BF16)
  return reinterpret_cast<B>(_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low)));
#else
  const __m256i a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(low)), 16));
  const __m256i b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(high)), 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
#endif
}

template <Kind K>
FH_INLINE void decode(const uint8_t* p, const Tables& t, B (*out)[kParts]) {
  if constexpr (K == Kind::kBf16) {
    for (int j = 0; j < kPairs; ++j) out[j][0] = _mm512_loadu_si512(p + j * 64);
  } else if constexpr (K == Kind::kInt8) {
    for (int j = 0; j < kPairs; ++j) out[j][0] = from_int8(p + j * 32);
  } else if constexpr (K == Kind::kFp8) {
    for (int j = 0; j < kPairs; ++j) out[j][0] = widen_fp8<true>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + j * 32)));
  } else {
    const __m512i words = _mm512_loadu_si512(p);
    out[0][0] = _mm512_permutexvar_epi16(words, t.a);
    out[1][0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), t.a);
    out[2][0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), t.a);
    out[3][0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), t.a);
  }
}

#else  // AVX2

struct Tables {  // lookup tables in registers
  __m256i low, high;  // int4: the two bytes of the 16 values
};
template <Kind K>
FH_INLINE Tables tables() {
  if constexpr (K == Kind::kInt4) {
    const __m128i a = _mm_load_si128(reinterpret_cast<const __m128i*>(kInt4.values));
    const __m128i b = _mm_load_si128(reinterpret_cast<const __m128i*>(kInt4.values + 8));
    const __m128i mask = _mm_set1_epi16(0xff);
    const __m128i low = _mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
    return {_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
  } else {
    return Tables();
  }
}

FH_INLINE B from_int8(const uint8_t* p) {
  const __m256i low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m256i high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)));
  const __m256i a = _mm256_srli_epi32(_mm256_castps_si256(_mm256_cvtepi32_ps(low)), 16);
  const __m256i b = _mm256_srli_epi32(_mm256_castps_si256(_mm256_cvtepi32_ps(high)), 16);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
}

FH_INLINE B from_int4(__m256i words, int shift, const Tables& t) {
  const __m256i n = _mm256_and_si256(_mm256_srli_epi16(words, shift), _mm256_set1_epi16(15));
  const __m256i low = _mm256_shuffle_epi8(t.low, n), high = _mm256_shuffle_epi8(t.high, n);
  const __m256i mask = _mm256_set1_epi16(0xff);
  return _mm256_or_si256(_mm256_and_si256(low, mask), _mm256_slli_epi16(high, 8));
}

template <Kind K>
FH_INLINE void decode(const uint8_t* p, const Tables& t, B (*out)[kParts]) {
  for (int half = 0; half < kParts; ++half) {
    if constexpr (K == Kind::kInt4) {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + half * 32));
      for (int j = 0; j < kPairs; ++j) out[j][half] = from_int4(words, 4 * j, t);
    } else {
      for (int j = 0; j < kPairs; ++j) {
        if constexpr (K == Kind::kBf16) {
          out[j][half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + j * 64 + half * 32));
        } else if constexpr (K == Kind::kInt8) {
          out[j][half] = from_int8(p + j * 32 + half * 16);
        } else {
          const auto* bytes = reinterpret_cast<const __m128i*>(p + j * 32 + half * 16);
          out[j][half] = widen_fp8<true>(_mm_loadu_si128(bytes));
        }
      }
    }
  }
}
#endif

template <Kind K>
FH_INLINE F scale_of(const Matrix& m, int64_t panel, int64_t group, int part) {
  const int64_t at = (panel * m.groups() + group) * kPanel + part * W;
  if constexpr (K == Kind::kFp8) {
    return load(static_cast<const float*>(m.scales) + at);
  } else {
    return widen(static_cast<const bf16*>(m.scales) + at);
  }
}

// ---- a few rows: every weight is read once --------------------------------------------------------------------------

// sums[m] = the panel's outputs for input row m.
template <Kind K, int M>
FH_INLINE void panel_tile(const Matrix& w, int64_t panel, const bf16* const* x, F (*sums)[kParts]) {
  const Tables t = tables<K>();
  const uint8_t* code = w.panel(panel);
  F acc[M][kParts];
  for (int m = 0; m < M; ++m)
    for (int h = 0; h < kParts; ++h) acc[m][h] = zero();
  int64_t group = 0;
  for (int64_t begin = 0; begin < w.inner; begin += w.group, ++group) {
    const int64_t end = min64(begin + w.group, w.inner);
    F part[M][kParts][2];
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < kParts; ++h) part[m][h][0] = part[m][h][1] = zero();
    for (int64_t k = begin; k < end; k += kChunk, code += kChunkBytes<K>) {
      for (int64_t b = 0; b < kChunkBytes<K>; b += 64) prefetch(code + kAhead + b);
      B weights[kPairs][kParts];
      decode<K>(code, t, weights);
      for (int j = 0; j < kPairs; ++j)
        for (int m = 0; m < M; ++m) {
          const B v = pair(x[m] + k + 2 * j);
          for (int h = 0; h < kParts; ++h) part[m][h][j & 1] = dp(part[m][h][j & 1], weights[j][h], v);
        }
    }
    for (int h = 0; h < kParts; ++h) {
      if constexpr (K == Kind::kBf16) {
        for (int m = 0; m < M; ++m) acc[m][h] = add(part[m][h][0], part[m][h][1]);
      } else {
        const F scale = scale_of<K>(w, panel, group, h);
        for (int m = 0; m < M; ++m) acc[m][h] = fma(scale, add(part[m][h][0], part[m][h][1]), acc[m][h]);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int h = 0; h < kParts; ++h) sums[m][h] = acc[m][h];
}

// emit(m, sums) for every row.
template <Kind K, class Emit>
FH_INLINE void panel_rows(const Matrix& w, int64_t panel, const bf16* const* x, int64_t rows, Emit emit) {
  F sums[kPanelRows][kParts];
  int64_t m = 0;
  const auto tile = [&](auto count) {
    constexpr int M = decltype(count)::value;
    for (; m + M <= rows; m += M) {
      panel_tile<K, M>(w, panel, x + m, sums);
      for (int k = 0; k < M; ++k) emit(m + k, sums[k]);
    }
  };
  if constexpr (kPanelRows >= 8) tile(Count<8>{});
  if constexpr (kPanelRows >= 4) tile(Count<4>{});
  tile(Count<2>{});
  tile(Count<1>{});
}

FH_INLINE void put_panel(bf16* out, int64_t o, const F* v, int64_t outputs) {
  for (int h = 0; h < kParts && o + h * W < outputs; ++h) put_lanes(out + o + h * W, v[h], outputs - o - h * W);
}
FH_INLINE void put_panel(float* out, int64_t o, const F* v, int64_t outputs) {
  for (int h = 0; h < kParts && o + h * W < outputs; ++h) put_lanes(out + o + h * W, v[h], outputs - o - h * W);
}

template <class Fn>
FH_INLINE void by_kind(Kind kind, Fn fn) {
  switch (kind) {
    case Kind::kBf16: return fn(KindOf<Kind::kBf16>{});
    case Kind::kInt8: return fn(KindOf<Kind::kInt8>{});
    case Kind::kInt4: return fn(KindOf<Kind::kInt4>{});
    case Kind::kFp8: return fn(KindOf<Kind::kFp8>{});
  }
}

template <class Out>
FH_INLINE void with_bias(F* v, const Out* bias, int64_t o, int64_t outputs) {
  for (int h = 0; h < kParts && o + h * W < outputs; ++h)
    v[h] = add(v[h], lanes_of(bias + o + h * W, outputs - o - h * W));
}

template <Kind K, class Out>
void product_of(const freehold::ProductArgs& a, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t o = panel * kPanel;
    panel_rows<K>(*a.weight, panel, a.x, a.rows, [&](int64_t m, F* v) {
      if (a.bias != nullptr) with_bias(v, a.bias, o, a.weight->outputs);
      put_panel(static_cast<Out*>(a.out[m]) - a.out_first, o, v, a.weight->outputs);
    });
  }
}

void product(const freehold::ProductArgs& a, int64_t first, int64_t last) {
  by_kind(a.weight->kind, [&](auto kind) {
    constexpr Kind K = decltype(kind)::value;
    a.out_fp32 ? product_of<K, float>(a, first, last) : product_of<K, bf16>(a, first, last);
  });
}

template <Kind K>
void gated_of(const freehold::GatedArgs& a, int64_t first, int64_t last) {
  F gate[16][kParts];
  for (int64_t panel = first; panel < last; ++panel) {
    panel_rows<K>(*a.gate, panel, a.x, a.rows, [&](int64_t m, const F* v) {
      for (int h = 0; h < kParts; ++h) gate[m][h] = silu(v[h]);
    });
    panel_rows<K>(*a.up, panel, a.x, a.rows, [&](int64_t m, F* v) {
      for (int h = 0; h < kParts; ++h) v[h] = mul(gate[m][h], v[h]);
      put_panel(a.out[m], panel * kPanel, v, a.gate->outputs);
    });
  }
}

void gated(const freehold::GatedArgs& a, int64_t first, int64_t last) {
  by_kind(a.gate->kind, [&](auto kind) { gated_of<decltype(kind)::value>(a, first, last); });
}

void accumulate(bf16* into, const bf16* x, int64_t size) {
  for (int64_t i = 0; i < size; i += W) {
    const int64_t n = min64(W, size - i);
    narrow(into + i, add(widen(into + i, n), widen(x + i, n)), n);
  }
}

void combine(bf16* out, const float* const* parts, const float* weights, int64_t count, int64_t size) {
  for (int64_t h = 0; h < size; h += W) {
    const int64_t n = min64(W, size - h);
    F total = zero();
    for (int64_t x = 0; x < count; ++x) total = fma(all(weights[x]), load(parts[x] + h, n), total);
    narrow(out + h, total, n);
  }
}

}  // namespace
