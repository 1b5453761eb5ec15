// Attention over gathered rows: scores, softmax, and sums of rows with per-head weights.
#pragma once

#include "dot.h"
#include "fp8.h"
#include "pack.h"

namespace {

using freehold::AttendArgs;
using freehold::kAttendChunk;

// low/high[m] = Σ_k p[m][k] · rows[k][column ..], two rows at a time so that bf16 pairs multiply at once.
// p[k / 2][W][2] holds the weights in pairs, a vector of outputs side by side; an odd last pair ends with 0.
template <int M>
FH_INLINE void mix_tile(const bf16* const* rows, int64_t count, const bf16* p, int64_t column, int64_t n, F* low,
                        F* high) {
  F sums[M][2];
  for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = zero();
  const auto add_pair = [&](B a, B b, const bf16* weights) __attribute__((always_inline)) {
    const B ab_low = low_pairs(a, b), ab_high = high_pairs(a, b);
    for (int m = 0; m < M; ++m) {
      const B w = pair(weights + 2 * m);
      sums[m][0] = dp(sums[m][0], ab_low, w);
      sums[m][1] = dp(sums[m][1], ab_high, w);
    }
  };
  int64_t k = 0;
  if (n == 2 * W) {
    for (; k + 2 <= count; k += 2) add_pair(load(rows[k] + column), load(rows[k + 1] + column), p + k * W);
  } else {
    for (; k + 2 <= count; k += 2) add_pair(load(rows[k] + column, n), load(rows[k + 1] + column, n), p + k * W);
  }
  if (k < count) add_pair(load(rows[k] + column, n), B{}, p + k * W);
  for (int m = 0; m < M; ++m) low[m] = sums[m][0], high[m] = sums[m][1];
}

// emit(m, column, values, how many) for up to W outputs and all columns.
template <class Emit>
FH_INLINE void mix(const bf16* const* rows, int64_t count_rows, const bf16* p, int64_t outputs, int64_t columns,
                   Emit emit) {
  for (int64_t c = 0; c < columns; c += 2 * W) {
    const int64_t n = min64(2 * W, columns - c);
    int64_t m = 0;
    const auto tiles = [&](auto count) __attribute__((always_inline)) {
      constexpr int M = decltype(count)::value;
      F low[M], high[M];
      for (; m + M <= outputs; m += M) {
        mix_tile<M>(rows, count_rows, p + 2 * m, c, n, low, high);
        for (int k = 0; k < M; ++k) {
          F first, second;
          consecutive(low[k], high[k], &first, &second);
          emit(m + k, c, first, min64(W, n));
          if (n > W) emit(m + k, c + W, second, n - W);
        }
      }
    };
    // As many outputs at a time as there are registers for, two a sum.
    if constexpr (FH_512) tiles(Count<12>{});
    if constexpr (FH_512) tiles(Count<8>{});
    tiles(Count<4>{});
    tiles(Count<1>{});
  }
}

// Prefetches every cache line of a latent. Inlined, because the compiler drops a call that only prefetches.
template <bool Far>
FH_INLINE void ask_for_latent(const AttendArgs& a, const char* latent) {
  const int64_t bytes = a.fp8 ? freehold::LatentRecord{a.rank, a.latent_dim - a.rank}.bytes() : a.latent_dim * 2;
  // Records start anywhere in a line.
  const char *line = a.fp8 ? latent - reinterpret_cast<uintptr_t>(latent) % 64 : latent, *const end = latent + bytes;
  for (; line < end; line += 64) {
    if constexpr (Far) prefetch_far(line);
    else prefetch(line);
  }
}

// One chunk of one row: maxima, sums and unnormalised outputs of every head.
void attend(const AttendArgs& a, int64_t row, int64_t chunk, float* part, char* scratch) {
  const int64_t heads = a.heads;
  float* scores = reinterpret_cast<float*>(scratch);                        // [heads][chunk]
  bf16* p = reinterpret_cast<bf16*>(scores + heads * kAttendChunk);         // [heads][chunk]
  bf16* packed = p + heads * kAttendChunk;                                  // [chunk/2][W][2]
  const bf16** rows = reinterpret_cast<const bf16**>(packed + kAttendChunk * W);
  bf16* staged = reinterpret_cast<bf16*>(rows + kAttendChunk);  // [chunk][latent_dim], of FP8 latents
  const int64_t first = chunk * kAttendChunk, end = min64(first + kAttendChunk, freehold::attend_count(a, row));
  const char* latents = static_cast<const char*>(a.latent);
  const int64_t stride = a.fp8 ? a.latent_stride : a.latent_stride * 2;
  int64_t count = 0;
  for (int64_t k = first; k < end; ++k)
    if (const int64_t slot = a.slots[row * a.slots_row + k]; slot >= 0) {
      // Selected rows lie anywhere: all are asked for at once, before the first is needed.
      ask_for_latent<false>(a, latents + slot * stride);
      rows[count++] = reinterpret_cast<const bf16*>(latents + slot * stride);  // FP8: a record, until it is widened
    }
  // And the next chunk's are on their way while this one is worked on.
  const int64_t next = min64(first + 2 * kAttendChunk, freehold::attend_count(a, row));
  for (int64_t k = first + kAttendChunk; k < next; ++k)
    if (const int64_t slot = a.slots[row * a.slots_row + k]; slot >= 0)
      ask_for_latent<true>(a, latents + slot * stride);
  const bf16* query = a.query + row * a.query_row;
  for (int64_t k = 0; k < count; k += 4) {
    const int64_t four = min64(4, count - k);
    for (int64_t j = 0; a.fp8 && j < four; ++j) {
      bf16* widened = staged + (k + j) * a.latent_dim;
      widen_record(reinterpret_cast<const uint8_t*>(rows[k + j]), a.rank, a.latent_dim - a.rank, widened);
      rows[k + j] = widened;
    }
    const bf16* w[4];
    for (int j = 0; j < 4; ++j) w[j] = rows[min64(k + j, count - 1)];
    for (int64_t h = 0; h < heads; h += kTileRows) {
      const bf16* x[kTileRows];
      const int64_t n = min64(kTileRows, heads - h);
      for (int64_t j = 0; j < n; ++j) x[j] = query + (h + j) * a.query_head;
      dot_rows(w, x, n, a.latent_dim, [&](int64_t m, __m128 v) {
        _mm_storeu_ps(scores + (h + m) * kAttendChunk + k, _mm_mul_ps(v, _mm_set1_ps(a.scale)));
      });
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    float* s = scores + h * kAttendChunk;
    for (int64_t k = count; k < (count + W - 1) / W * W; ++k) s[k] = -__builtin_inff();
    F highest = all(-__builtin_inff());
    for (int64_t k = 0; k < count; k += W) highest = max(load(s + k), highest);
    const float top = largest(highest);
    // Where every score is -inf the weights must be 0, not exp(-inf + inf).
    const F shift = all(top == -__builtin_inff() ? 0.0f : top);
    F total = zero();
    for (int64_t k = 0; k < count; k += W) {
      const F e = exp(sub(load(s + k), shift));
      narrow(p + h * kAttendChunk + k, e);
      total = add(total, e);
    }
    part[h] = top;
    part[heads + h] = sum(total);
  }
  float* out = part + 2 * heads;
  for (int64_t h = 0; h < heads; h += W) {
    const bf16* weights[W];
    const int64_t n = min64(W, heads - h);
    for (int64_t k = 0; k < W; ++k) weights[k] = p + (h + min64(k, n - 1)) * kAttendChunk;
    pack_rows(weights, count, packed, 2 * W);
    mix(rows, count, packed, n, a.rank,
        [&](int64_t m, int64_t c, F v, int64_t k) { put_lanes(out + (h + m) * a.rank + c, v, k); });
  }
}

// into ← into ⊕ part: both are rescaled to the greater maximum.
void merge(float* into, const float* part, int64_t heads, int64_t rank) {
  for (int64_t first = 0; first < heads; first += W) {
    const int64_t n = min64(W, heads - first);
    alignas(64) float fa[W], fb[W];
    const F a = load(into + first, n), b = load(part + first, n), top = max(a, b);
    // Where both are -inf, nothing is summed yet: -inf less a number, not less -inf.
    const F shift = max(top, all(-3.0e38f));
    const F va = exp(sub(a, shift)), vb = exp(sub(b, shift));
    store(fa, va), store(fb, vb);
    store(into + first, top, n);
    float* sums = into + heads + first;
    store(sums, fma(load(sums, n), va, mul(load(part + heads + first, n), vb)), n);
    for (int64_t h = 0; h < n; ++h) {
      float* x = into + 2 * heads + (first + h) * rank;
      const float* y = part + 2 * heads + (first + h) * rank;
      const F wa = all(fa[h]), wb = all(fb[h]);
      int64_t c = 0;
      for (; c + W <= rank; c += W) store(x + c, fma(load(x + c), wa, mul(load(y + c), wb)));
      if (c < rank) store(x + c, fma(load(x + c, rank - c), wa, mul(load(y + c, rank - c), wb)), rank - c);
    }
  }
}

void finish(bf16* out, int64_t out_head, const float* part, int64_t heads, int64_t rank) {
  for (int64_t h = 0; h < heads; ++h) {
    const F scale = all(1.0f / part[heads + h]);
    const float* x = part + 2 * heads + h * rank;
    for (int64_t c = 0; c < rank; c += W) {
      const int64_t n = min64(W, rank - c);
      narrow(out + h * out_head + c, mul(load(x + c, n), scale), n);
    }
  }
}

}  // namespace
