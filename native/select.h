// The indexer: scores of cached keys, and the exact set of the topk best of a stream of them.
//
// Many rows: keys are transposed in tiles of 4·W so that one lane is one key; a tile serves all heads and up to
// kSelectRows rows. Few rows cannot pay for transposing: there, where vectors are wide enough, one lane is one head
// (select_few.h). Scores never leave registers except for those above the row's threshold, which are appended to its
// candidates. 8-bit keys become bf16 a tile at a time; their scales are positive, and multiply the finished scores.
#pragma once

#include "dot.h"
#include "fp8.h"
#include "pack.h"

namespace {

using freehold::Candidates;
using freehold::SelectArgs;

constexpr int kVectors = 4;
constexpr int64_t kTile = kVectors * W;
constexpr int kScoreHeads = FH_512 ? 4 : 2;

// A walk over cached keys in order of position: blocks are looked up once each, because divisions are slow.
struct Walk {
  const SelectArgs& a;
  int64_t block, offset;
  Walk(const SelectArgs& args, int64_t position)
      : a(args), block(position / args.block_size), offset(position % args.block_size) {}
  int64_t slot() const { return a.table[block] * a.block_size + offset; }
  // Positions from here whose slots follow one another, at most n.
  int64_t run(int64_t n) const { return min64(n, a.block_size - offset); }
  void step(int64_t n) {  // n ≤ run
    offset += n;
    if (offset == a.block_size) ++block, offset = 0;
  }
};

// key[k] ← where the bf16 values of position first + k are, for count positions; those of 8-bit keys are made in
// `staged`, and their scales copied to `scales`.
FH_INLINE void stage_keys(const SelectArgs& a, int64_t first, int64_t count, const bf16** key, bf16* staged,
                          float* scales) {
  Walk walk(a, first);
  for (int64_t k = 0; k < count;) {
    const int64_t n = walk.run(count - k), slot = walk.slot();
    if (a.scales == nullptr) {
      const bf16* base = static_cast<const bf16*>(a.keys) + slot * a.keys_stride;
      for (int64_t i = 0; i < n; ++i) key[k + i] = base + i * a.keys_stride;
    } else {
      const uint8_t* base = static_cast<const uint8_t*>(a.keys) + slot * a.keys_stride;
      for (int64_t i = 0; i < n; ++i) {
        widen_fp8(base + i * a.keys_stride, a.dim, staged + (k + i) * a.dim);
        key[k + i] = staged + (k + i) * a.dim;
      }
      memcpy(scales + k, a.scales + slot, size_t(n) * 4);
    }
    k += n;
    walk.step(n);
  }
}

// packed[d / 2][key][2] ← the keys of positions first .. first + count - 1. Lanes past the last key repeat it.
FH_INLINE void pack_keys(const SelectArgs& a, int64_t first, int64_t count, bf16* staged, float* scales, bf16* packed) {
  const bf16* key[kTile];
  stage_keys(a, first, count, key, staged, scales);
  for (int64_t k = count; k < kTile; ++k) key[k] = key[count - 1];
  for (int v = 0; v < kVectors; ++v) pack_rows(key + v * W, a.dim, packed + v * W * 2, kTile * 2);
}

// Prefetches the keys of `count` positions from `walk` on, as far as they follow one another.
FH_INLINE void ask_for_keys(const Walk& walk, int64_t count) {
  const SelectArgs& a = walk.a;
  const int64_t width = a.scales == nullptr ? 2 : 1, bytes = walk.run(count) * a.keys_stride * width;
  const char* base = static_cast<const char*>(a.keys) + walk.slot() * a.keys_stride * width;
  for (int64_t i = 0; i < bytes; i += 64) prefetch(base + i);
}

template <int H>
FH_INLINE void score_heads(const bf16* packed, const bf16* query, int64_t query_head, const float* weight, int64_t dim,
                           F* scores) {
  F acc[H][kVectors];
  for (int h = 0; h < H; ++h)
    for (int v = 0; v < kVectors; ++v) acc[h][v] = zero();
  for (int64_t d = 0; d < dim; d += 2) {
    const bf16* key = packed + d * kTile;
    const B k0 = load(key), k1 = load(key + 2 * W), k2 = load(key + 4 * W), k3 = load(key + 6 * W);
    for (int h = 0; h < H; ++h) {
      const B q = pair(query + h * query_head + d);
      acc[h][0] = dp(acc[h][0], k0, q);
      acc[h][1] = dp(acc[h][1], k1, q);
      acc[h][2] = dp(acc[h][2], k2, q);
      acc[h][3] = dp(acc[h][3], k3, q);
    }
  }
  for (int h = 0; h < H; ++h) {
    const F w = all(weight[h]);
    // max returns its second operand when one is NaN: a NaN score stays one, as relu keeps it.
    for (int v = 0; v < kVectors; ++v) scores[v] = fma(w, max(zero(), acc[h][v]), scores[v]);
  }
}

// fp32 → integers in the same order: NaN largest, -0 equal to +0 (callers add 0, which makes -0 into +0).
FH_INLINE uint32_t sortable(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
FH_INLINE float unsortable(uint32_t k) {
  const uint32_t u = k & 0x80000000u ? k & 0x7fffffffu : ~k;
  float x;
  memcpy(&x, &u, 4);
  return x;
}

#if FH_512
using Lanes = __mmask16;
FH_INLINE Lanes above(F x, float threshold) { return _mm512_cmp_ps_mask(x, all(threshold), _CMP_NLE_UQ); }
FH_INLINE void append(Candidates& c, F x, Lanes lanes, int64_t position) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i flip = _mm512_or_si512(_mm512_srai_epi32(u, 31), _mm512_set1_epi32(int(0x80000000u)));
  const __m512i key = _mm512_mask_mov_epi32(_mm512_xor_si512(u, flip), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                            _mm512_set1_epi32(-1));
  const __m512i at = _mm512_add_epi32(_mm512_set1_epi32(int32_t(position)),
                                      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  // Compressed in a register and stored whole: a compressing store is microcoded and slow on some machines.
  _mm512_storeu_si512(c.keys + c.count, _mm512_maskz_compress_epi32(lanes, key));
  _mm512_storeu_si512(c.positions + c.count, _mm512_maskz_compress_epi32(lanes, at));
  c.count += __builtin_popcount(lanes);
}
FH_INLINE int64_t count_at_least(const uint32_t* keys, int64_t n, uint32_t bound) {
  const __m512i b = _mm512_set1_epi32(int32_t(bound));
  int64_t total = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    total += __builtin_popcount(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + i), b));
  for (; i < n; ++i) total += keys[i] >= bound;
  return total;
}
#else
using Lanes = uint32_t;
FH_INLINE Lanes above(F x, float threshold) {
  return Lanes(_mm256_movemask_ps(_mm256_cmp_ps(x, all(threshold), _CMP_NLE_UQ)));
}
FH_INLINE void append(Candidates& c, F x, Lanes lanes, int64_t position) {
  alignas(32) float t[8];
  _mm256_store_ps(t, x);
  for (; lanes != 0; lanes &= lanes - 1) {
    const int k = __builtin_ctz(lanes);
    c.keys[c.count] = sortable(t[k]);
    c.positions[c.count++] = int32_t(position + k);
  }
}
FH_INLINE int64_t count_at_least(const uint32_t* keys, int64_t n, uint32_t bound) {
  const __m256i b = _mm256_set1_epi32(int32_t(bound));
  __m256i total = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    total = _mm256_sub_epi32(total, _mm256_cmpeq_epi32(_mm256_max_epu32(k, b), k));
  }
  alignas(32) int32_t t[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(t), total);
  int64_t sum = 0;
  for (int k = 0; k < 8; ++k) sum += t[k];
  for (; i < n; ++i) sum += keys[i] >= bound;
  return sum;
}
#endif

// The topk-th largest key, bit by bit from the top: the largest bound that at least topk keys reach.
FH_INLINE uint32_t nth_largest(const uint32_t* keys, int64_t n, int64_t topk) {
  uint32_t all_or = 0, all_and = 0xffffffffu;
  for (int64_t i = 0; i < n; ++i) all_or |= keys[i], all_and &= keys[i];
  // Bits above the first that differs are known.
  const uint32_t differ = all_or ^ all_and;
  if (differ == 0) return all_and;
  const int top = 31 - __builtin_clz(differ);
  uint32_t bound = top == 31 ? 0 : all_and & ~((2u << top) - 1);
  for (int bit = top; bit >= 0; --bit) {
    const uint32_t trial = bound | (1u << bit);
    if (count_at_least(keys, n, trial) >= topk) bound = trial;
  }
  return bound;
}

void keep(Candidates& c, int64_t topk) {
  if (c.count < topk) return;
  const uint32_t bound = nth_largest(c.keys, c.count, topk);
  int64_t equal = topk - (bound == 0xffffffffu ? 0 : count_at_least(c.keys, c.count, bound + 1));
  int64_t kept = 0;
  for (int64_t i = 0; i < c.count; ++i) {
    const uint32_t key = c.keys[i];
    c.keys[kept] = key;
    c.positions[kept] = c.positions[i];
    const bool tie = key == bound;
    kept += (key > bound) | (tie & (equal > 0));
    equal -= tie;
  }
  c.count = kept;
  c.open = false;
  c.threshold = bound == 0xffffffffu ? __builtin_nanf("") : unsortable(bound);
}

// Appends the scores of n ≥ 1 positions from `position` on that may be among the best.
FH_INLINE void offer(Candidates& c, F scores, int64_t position, int64_t n) {
  const Lanes valid = n >= W ? Lanes((1u << W) - 1) : Lanes((1u << n) - 1);
  const F x = add(scores, zero());
  const Lanes lanes = c.open ? valid : Lanes(above(x, c.threshold) & valid);
  if (lanes != 0) append(c, x, lanes, position);
}

void score_packed(const SelectArgs& a, int64_t row, int64_t rows, int64_t first, int64_t last, Candidates* candidates,
                  const freehold::SelectScratch& layout, char* scratch) {
  bf16* staged = reinterpret_cast<bf16*>(scratch);
  bf16* packed = reinterpret_cast<bf16*>(scratch + layout.staged);
  float* scales = reinterpret_cast<float*>(scratch + layout.staged + layout.packed);
  for (int64_t tile = first; tile < last; tile += kTile) {
    const int64_t keys = min64(kTile, last - tile);
    pack_keys(a, tile, keys, staged, scales, packed);
    if (rows == 1 && tile + 2 * kTile <= last) ask_for_keys(Walk(a, tile + kTile), kTile);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t seen = min64(keys, a.start + row + r + 1 - tile);
      if (seen <= 0) continue;
      const bf16* query = a.query + (row + r) * a.query_row;
      const float* weight = a.weight + (row + r) * a.weight_row;
      F scores[kVectors];
      for (int v = 0; v < kVectors; ++v) scores[v] = zero();
      int64_t h = 0;
      for (; h + kScoreHeads <= a.heads; h += kScoreHeads)
        score_heads<kScoreHeads>(packed, query + h * a.query_head, a.query_head, weight + h, a.dim, scores);
      for (; h < a.heads; ++h)
        score_heads<1>(packed, query + h * a.query_head, a.query_head, weight + h, a.dim, scores);
      Candidates& c = candidates[r];
      for (int v = 0; v < kVectors && v * W < seen; ++v) {
        if (a.scales != nullptr) scores[v] = mul(scores[v], load(scales + v * W));
        offer(c, scores[v], tile + v * W, seen - v * W);
      }
      if (c.count > c.capacity) keep(c, a.topk);
    }
  }
}

}  // namespace

#include "select_few.h"

namespace {

void score(const SelectArgs& a, int64_t row, int64_t rows, int64_t first, int64_t last, Candidates* candidates,
           char* scratch) {
  const freehold::SelectScratch layout(kTile, rows, a.heads, a.dim);
#if FH_512
  if (a.few && a.dim % 4 == 0) return score_few(a, row, rows, first, last, candidates, layout, scratch);
#endif
  score_packed(a, row, rows, first, last, candidates, layout, scratch);
}

}  // namespace
