// Attention over gathered rows, and the absorb product: sums of rows with per-head weights.
#pragma once

#include "dot.h"

namespace {

using freehold::AttendArgs;
using freehold::kAttendChunk;

constexpr int kMixRows = FH_512 ? 8 : 3;

// low/high[m] += Σ_k p[m][k] · rows[k][column ..], two rows at a time so that bf16 pairs multiply at once.
// p holds pairs (k, k+1): the one of pair i and output m is at p + i·pair_stride + m·row_stride.
template <int M>
FH_INLINE void mix_tile(const bf16* const* rows, int64_t count, const bf16* p, int64_t pair_stride, int64_t row_stride,
                        int64_t column, int64_t n, F* low, F* high) {
  for (int m = 0; m < M; ++m) low[m] = high[m] = zero();
  int64_t k = 0;
  for (; k + 2 <= count; k += 2) {
    B a, b;
    if (n == 2 * W) {
      a = load(rows[k] + column), b = load(rows[k + 1] + column);
    } else {
      a = load(rows[k] + column, n), b = load(rows[k + 1] + column, n);
    }
    const B ab_low = low_pairs(a, b), ab_high = high_pairs(a, b);
    for (int m = 0; m < M; ++m) {
      const B w = pair(p + (k >> 1) * pair_stride + m * row_stride);
      low[m] = dp(low[m], ab_low, w);
      high[m] = dp(high[m], ab_high, w);
    }
  }
  if (k < count) {  // an odd last row: its partner is zero, and so is its partner's weight
    const B a = load(rows[k] + column, n);
    const B ab_low = low_pairs(a, B{}), ab_high = high_pairs(a, B{});
    for (int m = 0; m < M; ++m) {
      const bf16 last[2] = {p[(k >> 1) * pair_stride + m * row_stride], 0};
      const B w = pair(last);
      low[m] = dp(low[m], ab_low, w);
      high[m] = dp(high[m], ab_high, w);
    }
  }
}

// emit(m, column, values, how many) for all outputs of all columns.
template <class Emit>
FH_INLINE void mix(const bf16* const* rows, int64_t count, const bf16* p, int64_t pair_stride, int64_t row_stride,
                   int64_t outputs, int64_t columns, Emit emit) {
  F low[kMixRows], high[kMixRows];
  for (int64_t c = 0; c < columns; c += 2 * W) {
    const int64_t n = min64(2 * W, columns - c);
    auto put_out = [&](int64_t m, int k) {
      F first, second;
      consecutive(low[k], high[k], &first, &second);
      emit(m, c, first, min64(W, n));
      if (n > W) emit(m, c + W, second, n - W);
    };
    int64_t m = 0;
    for (; m + kMixRows <= outputs; m += kMixRows) {
      mix_tile<kMixRows>(rows, count, p + m * row_stride, pair_stride, row_stride, c, n, low, high);
      for (int k = 0; k < kMixRows; ++k) put_out(m + k, k);
    }
    for (; m < outputs; ++m) {
      mix_tile<1>(rows, count, p + m * row_stride, pair_stride, row_stride, c, n, low, high);
      put_out(m, 0);
    }
  }
}

void absorb(bf16* out, int64_t out_row, const bf16* query, int64_t query_row, const bf16* up, int64_t up_stride,
            int64_t rows, int64_t nope, int64_t rank) {
  constexpr int64_t kMost = 512;  // rows of W_UK taken at once; more would need a second, separate sum
  const bf16* w[kMost];
  for (int64_t a = 0; a < nope; ++a) w[a] = up + a * up_stride;
  mix(w, nope, query, 2, query_row, rows, rank,
      [&](int64_t m, int64_t c, F v, int64_t n) { narrow(out + m * out_row + c, v, n); });
}

// One chunk of one row: maxima, sums and unnormalised outputs of every head.
void attend(const AttendArgs& a, int64_t row, int64_t chunk, float* part, char* scratch) {
  const int64_t heads = a.heads, pairs = kAttendChunk / 2;
  float* scores = reinterpret_cast<float*>(scratch);                        // [heads][chunk]
  bf16* p = reinterpret_cast<bf16*>(scores + heads * kAttendChunk);         // [chunk/2][heads][2]
  const bf16** rows = reinterpret_cast<const bf16**>(p + heads * kAttendChunk);
  const int64_t first = chunk * kAttendChunk, end = min64(first + kAttendChunk, a.count);
  int64_t count = 0;
  for (int64_t k = first; k < end; ++k)
    if (const int64_t slot = a.slots[row * a.slots_row + k]; slot >= 0) rows[count++] = a.latent + slot * a.latent_stride;
  const bf16* query = a.query + row * a.query_row;
  for (int64_t k = 0; k < count; k += 4) {
    const bf16* w[4];
    for (int j = 0; j < 4; ++j) w[j] = rows[min64(k + j, count - 1)];
    for (int64_t h = 0; h < heads; h += kTileRows) {
      const bf16* x[kTileRows];
      const int64_t n = min64(kTileRows, heads - h);
      for (int64_t j = 0; j < n; ++j) x[j] = query + (h + j) * a.query_head;
      dot_rows<bf16>(w, x, n, a.latent_dim, [&](int64_t m, __m128 v) {
        _mm_storeu_ps(scores + (h + m) * kAttendChunk + k, _mm_mul_ps(v, _mm_set1_ps(a.scale)));
      });
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    float* s = scores + h * kAttendChunk;
    float top = -__builtin_inff();
    for (int64_t k = 0; k < count; ++k) top = s[k] > top ? s[k] : top;
    // Where every score is -inf the weights must be 0, not exp(-inf + inf).
    const F shift = all(top == -__builtin_inff() ? 0.0f : top);
    F total = zero();
    for (int64_t k = 0; k < count; k += W) {
      const int64_t n = min64(W, count - k);
      F e = exp(sub(load(s + k, n), shift));
      store(s + k, e, n);
      total = add(total, load(s + k, n));
    }
    for (int64_t k = 0; k < count; ++k) p[((k >> 1) * heads + h) * 2 + (k & 1)] = narrow(s[k]);
    part[h] = top;
    part[heads + h] = sum(total);
  }
  (void)pairs;
  float* out = part + 2 * heads;
  mix(rows, count, p, 2 * heads, 2, heads, a.rank,
      [&](int64_t h, int64_t c, F v, int64_t n) { store(out + h * a.rank + c, v, n); });
}

// into ← into ⊕ part: both are rescaled to the greater maximum.
void merge(float* into, const float* part, int64_t heads, int64_t rank) {
  for (int64_t h = 0; h < heads; ++h) {
    const float a = into[h], b = part[h], top = a > b ? a : b;
    const float shift = top == -__builtin_inff() ? 0.0f : top;
    const float fa = exp1(a - shift), fb = exp1(b - shift);
    into[h] = top;
    into[heads + h] = into[heads + h] * fa + part[heads + h] * fb;
    float* x = into + 2 * heads + h * rank;
    const float* y = part + 2 * heads + h * rank;
    const F va = all(fa), vb = all(fb);
    for (int64_t c = 0; c < rank; c += W) {
      const int64_t n = min64(W, rank - c);
      store(x + c, fma(load(x + c, n), va, mul(load(y + c, n), vb)), n);
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
