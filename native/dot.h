// Dot products of weight rows with a few input rows: the core of linear, gated, route and attention scores.
//
// A tile is 4 weight rows × up to 4 input rows. Each output has one accumulator that runs over `inner` in order, and
// one way of summing its lanes, so an output does not depend on the rows beside it.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace {

FH_INLINE B load_step(const bf16* p) { return load(p); }
FH_INLINE B load_step(const bf16* p, int64_t n) { return load(p, n); }
FH_INLINE F load_step(const float* p) { return load(p); }
FH_INLINE F load_step(const float* p, int64_t n) { return load(p, n); }
FH_INLINE F accumulate(F acc, B a, B b) { return dp(acc, a, b); }
FH_INLINE F accumulate(F acc, F a, F b) { return fma(a, b, acc); }

// How many input rows share a tile: as many accumulators as there are registers for.
constexpr int kTileRows = FH_512 ? 4 : 2;

template <class T, int M>
FH_INLINE void dot_tile(const T* const* w, const T* const* x, int64_t inner, __m128* out) {
  constexpr int64_t step = 4 * W / int64_t(sizeof(T));
  F acc[M][4];
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < 4; ++k) acc[m][k] = zero();
  const T *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
  int64_t i = 0;
  for (; i + step <= inner; i += step) {
    auto a = load_step(w0 + i), b = load_step(w1 + i), c = load_step(w2 + i), d = load_step(w3 + i);
    for (int m = 0; m < M; ++m) {
      auto v = load_step(x[m] + i);
      acc[m][0] = accumulate(acc[m][0], a, v);
      acc[m][1] = accumulate(acc[m][1], b, v);
      acc[m][2] = accumulate(acc[m][2], c, v);
      acc[m][3] = accumulate(acc[m][3], d, v);
    }
  }
  if (int64_t n = inner - i; n > 0) {
    auto a = load_step(w0 + i, n), b = load_step(w1 + i, n), c = load_step(w2 + i, n), d = load_step(w3 + i, n);
    for (int m = 0; m < M; ++m) {
      auto v = load_step(x[m] + i, n);
      acc[m][0] = accumulate(acc[m][0], a, v);
      acc[m][1] = accumulate(acc[m][1], b, v);
      acc[m][2] = accumulate(acc[m][2], c, v);
      acc[m][3] = accumulate(acc[m][3], d, v);
    }
  }
  for (int m = 0; m < M; ++m) out[m] = sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
}

// The same sums with the weight rows read one after the other, which memory delivers faster than four at a time.
// ahead: where weights lie that will be needed soon, relative to these.
template <class T, int M>
FH_INLINE void stream_tile(const T* const* w, const T* const* x, int64_t inner, int64_t ahead, __m128* out) {
  constexpr int64_t step = 4 * W / int64_t(sizeof(T));
  F acc[M][4];
  for (int k = 0; k < 4; ++k) {
    F sums[M];
    for (int m = 0; m < M; ++m) sums[m] = zero();
    const T* row = w[k];
    int64_t i = 0;
    for (; i + step <= inner; i += step) {
      prefetch(row + i + ahead);
      auto a = load_step(row + i);
      for (int m = 0; m < M; ++m) sums[m] = accumulate(sums[m], a, load_step(x[m] + i));
    }
    if (int64_t n = inner - i; n > 0) {
      auto a = load_step(row + i, n);
      for (int m = 0; m < M; ++m) sums[m] = accumulate(sums[m], a, load_step(x[m] + i, n));
    }
    for (int m = 0; m < M; ++m) acc[m][k] = sums[m];
  }
  for (int m = 0; m < M; ++m) out[m] = sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
}

// emit(m, sums of the 4 weight rows) for every input row. ahead: not 0 where weights come from memory; the first tile
// streams them, and the others find them in the cache.
template <class T, class Emit>
FH_INLINE void dot_rows(const T* const* w, const T* const* x, int64_t rows, int64_t inner, int64_t ahead, Emit emit) {
  __m128 out[4];
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) {
    if (m == 0 && ahead != 0) {
      stream_tile<T, kTileRows>(w, x + m, inner, ahead, out);
    } else {
      dot_tile<T, kTileRows>(w, x + m, inner, out);
    }
    for (int k = 0; k < kTileRows; ++k) emit(m + k, out[k]);
  }
  for (; m < rows; ++m) {
    if (m == 0 && ahead != 0) {
      stream_tile<T, 1>(w, x + m, inner, ahead, out);
    } else {
      dot_tile<T, 1>(w, x + m, inner, out);
    }
    emit(m, out[0]);
  }
}

// How far ahead weights are asked for.
constexpr int64_t kRowsAhead = 8;

// The four rows from `first` of a matrix; past the last row, the last again (its results are not used).
template <class T>
FH_INLINE void four_rows(const T* base, int64_t stride, int64_t first, int64_t last, const T** w) {
  for (int k = 0; k < 4; ++k) w[k] = base + min64(first + k, last - 1) * stride;
}

FH_INLINE void put(float* p, __m128 v, int64_t n) {
  if (n >= 4) return _mm_storeu_ps(p, v);
  alignas(16) float t[4];
  _mm_store_ps(t, v);
  for (int64_t k = 0; k < n; ++k) p[k] = t[k];
}
FH_INLINE void put(bf16* p, __m128 v, int64_t n) {
  if (n >= 4) return narrow4(p, v);
  alignas(16) float t[4];
  _mm_store_ps(t, v);
  for (int64_t k = 0; k < n; ++k) p[k] = narrow(t[k]);
}
FH_INLINE __m128 get(const float* p, int64_t n) {
  alignas(16) float t[4] = {};
  for (int64_t k = 0; k < min64(n, 4); ++k) t[k] = p[k];
  return _mm_load_ps(t);
}
FH_INLINE __m128 get(const bf16* p, int64_t n) {
  alignas(16) float t[4] = {};
  for (int64_t k = 0; k < min64(n, 4); ++k) t[k] = widen(p[k]);
  return _mm_load_ps(t);
}

template <class T, class Out>
void linear_range(const freehold::LinearArgs& a, int64_t first, int64_t last) {
  const T* const* x = reinterpret_cast<const T* const*>(a.x);
  Out* const* out = reinterpret_cast<Out* const*>(a.out);
  const Out* bias = static_cast<const Out*>(a.bias);
  const T* w[4];
  const int64_t ahead = kRowsAhead * a.weight_stride;
  for (int64_t o = first; o < last; o += 4) {
    const int64_t n = last - o;
    four_rows(static_cast<const T*>(a.weight), a.weight_stride, o, last, w);
    if (bias != nullptr) {
      const __m128 b = get(bias + o, n);
      dot_rows<T>(w, x, a.rows, a.inner, ahead, [&](int64_t m, __m128 v) { put(out[m] + (o - a.out_first), _mm_add_ps(v, b), n); });
    } else {
      dot_rows<T>(w, x, a.rows, a.inner, ahead, [&](int64_t m, __m128 v) { put(out[m] + (o - a.out_first), v, n); });
    }
  }
}

void linear(const freehold::LinearArgs& a, int64_t first, int64_t last) {
  if (a.fp32) return linear_range<float, float>(a, first, last);
  if (a.out_fp32) return linear_range<bf16, float>(a, first, last);
  return linear_range<bf16, bf16>(a, first, last);
}

void gated(const freehold::GatedArgs& a, int64_t first, int64_t last) {
  // Sixteen outputs at a time, so that the exponential works on whole vectors.
  constexpr int64_t kBlock = 16, kRows = 16;
  alignas(64) float gate[kRows][kBlock], up[kRows][kBlock];
  const bf16* const* x = reinterpret_cast<const bf16* const*>(a.x);
  const bf16* w[4];
  for (int64_t i = first; i < last; i += kBlock) {
    const int64_t n = min64(kBlock, last - i);
    for (int64_t k = 0; k < n; k += 4) {
      four_rows(a.gate, a.gate_stride, i + k, last, w);
      dot_rows<bf16>(w, x, a.rows, a.inner, kRowsAhead * a.gate_stride,
                     [&](int64_t m, __m128 v) { _mm_store_ps(gate[m] + k, v); });
    }
    for (int64_t k = 0; k < n; k += 4) {
      four_rows(a.up, a.up_stride, i + k, last, w);
      dot_rows<bf16>(w, x, a.rows, a.inner, kRowsAhead * a.up_stride,
                     [&](int64_t m, __m128 v) { _mm_store_ps(up[m] + k, v); });
    }
    for (int64_t m = 0; m < a.rows; ++m)
      for (int64_t k = 0; k < n; k += W)
        narrow(a.out[m] + i + k, mul(silu(load(gate[m] + k)), load(up[m] + k)), min64(W, n - k));
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
