// Scores of a few rows (decode, speculation) without transposing keys: one lane is one head.
//
// A query is rearranged so that a vector has the same four values of eight heads; a key's four values are broadcast to
// all of them. Sixteen keys at a time, because their scores then come out as one vector. The order of every sum is the
// same however many rows there are.
#pragma once

#if FH_512

namespace {

constexpr int64_t kGroup = 8;         // heads of a vector
constexpr int64_t kKeys = 16;         // keys at a time
constexpr int64_t kKeysAhead = 128;  // positions between the keys that are asked for and those that are scored

// out[group][d / 4][head of the group][4] ← a row's query; heads past the last are zeros.
FH_INLINE void arrange_query(const SelectArgs& a, int64_t row, bf16* out) {
  const bf16* query = a.query + row * a.query_row;
  const int64_t heads = (a.heads + kGroup - 1) / kGroup * kGroup;
  for (int64_t h = 0; h < heads; ++h) {
    bf16* to = out + h / kGroup * kGroup * a.dim + h % kGroup * 4;
    for (int64_t d = 0; d < a.dim; d += 4, to += kGroup * 4) {
      if (h < a.heads) memcpy(to, query + h * a.query_head + d, 8);
      else memset(to, 0, 8);
    }
  }
}

FH_INLINE B four(const bf16* p) {
  int64_t x;
  memcpy(&x, p, 8);
  return _mm512_set1_epi64(x);
}
// Sums of the even and the odd lane of each pair: in each 128-bit part two of `a`, then two of `b`.
FH_INLINE F pair_sums(F a, F b) { return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd)); }

// Scores of 16 keys that lie `stride` values apart.
FH_INLINE F score_keys(const SelectArgs& a, const bf16* key, int64_t stride, const bf16* query, const float* weight) {
  F total[kKeys / 2];
  for (F& t : total) t = zero();
  for (int64_t h = 0; h < a.heads; h += kGroup, query += kGroup * a.dim) {
    F acc[kKeys];
    for (F& x : acc) x = zero();
    // Addresses in few registers: four bases, and one, two and three strides from each.
    const bf16 *k0 = key, *k1 = key + 4 * stride, *k2 = key + 8 * stride, *k3 = key + 12 * stride;
    for (int64_t d = 0; d < a.dim; d += 4) {
      const B q = load(query + d * kGroup);
      const bf16* base[4] = {k0 + d, k1 + d, k2 + d, k3 + d};
      for (int b = 0; b < 4; ++b)
        for (int k = 0; k < 4; ++k) acc[4 * b + k] = dp(acc[4 * b + k], four(base[b] + k * stride), q);
    }
    // Lanes of a pair of keys: in part i the heads 2i, 2i + 1 of the first, then of the second.
    const int64_t n = min64(kGroup, a.heads - h);
    const F w = _mm512_castsi512_ps(_mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7), _mm512_castps_si512(load(weight + h, n))));
    const Mask heads = _mm512_cmplt_epi32_mask(
        _mm512_setr_epi32(0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7), _mm512_set1_epi32(int32_t(n)));
    for (int k = 0; k < kKeys / 2; ++k)  // max returns its second operand when one is NaN, as relu keeps it
      total[k] = _mm512_mask3_fmadd_ps(w, max(zero(), pair_sums(acc[2 * k], acc[2 * k + 1])), total[k], heads);
  }
  F fours[4];  // in each part four keys, of a pair of heads
  for (int k = 0; k < 4; ++k) fours[k] = pair_sums(total[2 * k], total[2 * k + 1]);
  const F low = add(_mm512_shuffle_f32x4(fours[0], fours[1], 0x44), _mm512_shuffle_f32x4(fours[0], fours[1], 0xee));
  const F high = add(_mm512_shuffle_f32x4(fours[2], fours[3], 0x44), _mm512_shuffle_f32x4(fours[2], fours[3], 0xee));
  return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

void score_few(const SelectArgs& a, int64_t row, int64_t rows, int64_t first, int64_t last, Candidates* candidates,
               const freehold::SelectScratch& layout, char* scratch) {
  bf16* staged = reinterpret_cast<bf16*>(scratch);
  float* scales = reinterpret_cast<float*>(scratch + layout.staged + layout.packed);
  bf16* queries = reinterpret_cast<bf16*>(scratch + layout.staged + layout.packed + layout.scales);
  const int64_t query_size = (a.heads + kGroup - 1) / kGroup * kGroup * a.dim;
  for (int64_t r = 0; r < rows; ++r) arrange_query(a, row + r, queries + r * query_size);
  const bool staging = a.scales != nullptr || a.block_size % kKeys != 0;
  Walk ahead(a, first);
  int64_t asked = first;
  for (int64_t tile = first; tile < last; tile += kTile) {
    const int64_t keys = min64(kTile, last - tile);
    const bf16* key[kTile];
    stage_keys(a, tile, keys, key, staged, scales);
    for (int64_t k = 0; k < keys; k += kKeys) {
      const int64_t position = tile + k, n = min64(kKeys, keys - k);
      while (asked < min64(last, position + kKeysAhead + kKeys)) {
        const int64_t run = ahead.run(min64(kKeys, last - asked));
        ask_for_keys(ahead, run);
        ahead.step(run);
        asked += run;
      }
      const bf16* sixteen = key[k];
      int64_t stride = a.keys_stride;
      if (staging || n < kKeys) {  // else they are read where they are
        sixteen = staged + k * a.dim, stride = a.dim;
        if (a.scales == nullptr)
          for (int64_t i = k; i < k + n; ++i) memcpy(staged + i * a.dim, key[i], size_t(a.dim) * 2);
        for (int64_t i = k + n; i < k + kKeys; ++i) memset(staged + i * a.dim, 0, size_t(a.dim) * 2);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t seen = min64(n, a.start + row + r + 1 - position);
        if (seen <= 0) continue;
        F scores = score_keys(a, sixteen, stride, queries + r * query_size, a.weight + (row + r) * a.weight_row);
        if (a.scales != nullptr) scores = mul(scores, load(scales + k));
        Candidates& c = candidates[r];
        offer(c, scores, position, seen);
        if (c.count > c.capacity) keep(c, a.topk);
      }
    }
  }
}

}  // namespace

#endif
