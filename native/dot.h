// Dot products of bf16 rows with a few input rows: attention's scores.
//
// A tile is 4 rows × up to 4 input rows. Each output has one accumulator that runs over `inner` in order, and one way of
// summing its lanes, so an output does not depend on the rows beside it.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace {

// How many input rows share a tile: as many accumulators as there are registers for.
constexpr int kTileRows = FH_512 ? 4 : 2;

template <int M>
FH_INLINE void dot_tile(const bf16* const* w, const bf16* const* x, int64_t inner, __m128* out) {
  F acc[M][4];
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < 4; ++k) acc[m][k] = zero();
  const bf16 *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
  const auto step = [&](B a, B b, B c, B d, const B* v) __attribute__((always_inline)) {
    for (int m = 0; m < M; ++m) {
      acc[m][0] = dp(acc[m][0], a, v[m]);
      acc[m][1] = dp(acc[m][1], b, v[m]);
      acc[m][2] = dp(acc[m][2], c, v[m]);
      acc[m][3] = dp(acc[m][3], d, v[m]);
    }
  };
  int64_t i = 0;
  B v[M];
  for (; i + 2 * W <= inner; i += 2 * W) {
    for (int m = 0; m < M; ++m) v[m] = load(x[m] + i);
    step(load(w0 + i), load(w1 + i), load(w2 + i), load(w3 + i), v);
  }
  if (const int64_t n = inner - i; n > 0) {
    for (int m = 0; m < M; ++m) v[m] = load(x[m] + i, n);
    step(load(w0 + i, n), load(w1 + i, n), load(w2 + i, n), load(w3 + i, n), v);
  }
  for (int m = 0; m < M; ++m) out[m] = sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
}

// emit(m, sums of the 4 rows) for every input row.
template <class Emit>
FH_INLINE void dot_rows(const bf16* const* w, const bf16* const* x, int64_t rows, int64_t inner, Emit emit) {
  __m128 out[4];
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) {
    dot_tile<kTileRows>(w, x + m, inner, out);
    for (int k = 0; k < kTileRows; ++k) emit(m + k, out[k]);
  }
  for (; m < rows; ++m) {
    dot_tile<1>(w, x + m, inner, out);
    emit(m, out[0]);
  }
}

}  // namespace
