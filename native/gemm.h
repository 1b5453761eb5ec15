// Matrix multiplication for many rows: weights are packed a few vectors of outputs at a time, and each packed tile
// serves all rows. Rows are given by pointer, so that experts need no gathered copy.
#pragma once

#include "dot.h"
#include "pack.h"

namespace {

// Rows of a tile: as many accumulators as there are registers for, two a row.
constexpr int kGemmRows = FH_512 ? 12 : 4, kGemmFewRows = FH_512 ? 4 : 2;

// acc[r][v] = x[r] · outputs of vector v. packed[k / 2][2][W][2].
template <int R>
FH_INLINE void gemm_tile(const bf16* packed, const bf16* const* x, int64_t inner, F (*out)[2]) {
  F acc[R][2];
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = zero();
  int64_t k = 0;
  for (; k + 2 <= inner; k += 2) {
    const B a = load(packed + k * 2 * W), b = load(packed + k * 2 * W + 2 * W);
    for (int r = 0; r < R; ++r) {
      const B v = pair(x[r] + k);
      acc[r][0] = dp(acc[r][0], a, v);
      acc[r][1] = dp(acc[r][1], b, v);
    }
  }
  if (k < inner) {
    const B a = load(packed + k * 2 * W), b = load(packed + k * 2 * W + 2 * W);
    for (int r = 0; r < R; ++r) {
      const bf16 last[2] = {x[r][k], 0};
      acc[r][0] = dp(acc[r][0], a, pair(last));
      acc[r][1] = dp(acc[r][1], b, pair(last));
    }
  }
  for (int r = 0; r < R; ++r) out[r][0] = acc[r][0], out[r][1] = acc[r][1];
}

// emit(r, acc of both vectors) for every row.
template <class Emit>
FH_INLINE void gemm_rows(const bf16* packed, const bf16* const* x, int64_t rows, int64_t inner, Emit emit) {
  F acc[kGemmRows][2];
  int64_t r = 0;
  for (; r + kGemmRows <= rows; r += kGemmRows) {
    gemm_tile<kGemmRows>(packed, x + r, inner, acc);
    for (int64_t j = 0; j < kGemmRows; ++j) emit(r + j, acc[j]);
  }
  for (; r < rows; r += kGemmFewRows) {
    const int64_t n = min64(kGemmFewRows, rows - r);
    const bf16* mine[kGemmFewRows];
    for (int j = 0; j < kGemmFewRows; ++j) mine[j] = x[r + min64(j, n - 1)];
    gemm_tile<kGemmFewRows>(packed, mine, inner, acc);
    for (int64_t j = 0; j < n; ++j) emit(r + j, acc[j]);
  }
}

FH_INLINE void rows_from(const bf16* base, int64_t stride, int64_t first, int64_t last, const bf16** rows) {
  for (int k = 0; k < W; ++k) rows[k] = base + min64(first + k, last - 1) * stride;
}

template <class Out>
void gemm_range(const freehold::LinearArgs& a, int64_t first, int64_t last, bf16* packed) {
  Out* const* out = reinterpret_cast<Out* const*>(a.out);
  const bf16* rows[W];
  for (int64_t o = first; o < last; o += 2 * W) {
    const int64_t n = last - o;
    for (int v = 0; v < 2; ++v) {
      rows_from(static_cast<const bf16*>(a.weight), a.weight_stride, o + v * W, last, rows);
      pack_rows(rows, a.inner, packed + v * 2 * W, 4 * W);
    }
    F bias[2] = {zero(), zero()};
    if (a.bias != nullptr) {
      bias[0] = lanes_of(static_cast<const Out*>(a.bias) + o, n);
      if (n > W) bias[1] = lanes_of(static_cast<const Out*>(a.bias) + o + W, n - W);
    }
    gemm_rows(packed, reinterpret_cast<const bf16* const*>(a.x), a.rows, a.inner, [&](int64_t r, const F* acc) {
      put_lanes(out[r] + (o - a.out_first), add(acc[0], bias[0]), n);
      if (n > W) put_lanes(out[r] + (o - a.out_first) + W, add(acc[1], bias[1]), n - W);
    });
  }
}

// Like linear() of bf16; packed has room for 2·W outputs.
void gemm(const freehold::LinearArgs& a, int64_t first, int64_t last, bf16* packed) {
  if (a.out_fp32) return gemm_range<float>(a, first, last, packed);
  return gemm_range<bf16>(a, first, last, packed);
}

// Like gated(): one vector of gates beside one of ups.
void gemm_gated(const freehold::GatedArgs& a, int64_t first, int64_t last, bf16* packed) {
  const bf16* rows[W];
  for (int64_t i = first; i < last; i += W) {
    const int64_t n = last - i;
    rows_from(a.gate, a.gate_stride, i, last, rows);
    pack_rows(rows, a.inner, packed, 4 * W);
    rows_from(a.up, a.up_stride, i, last, rows);
    pack_rows(rows, a.inner, packed + 2 * W, 4 * W);
    gemm_rows(packed, reinterpret_cast<const bf16* const*>(a.x), a.rows, a.inner, [&](int64_t r, const F* acc) {
      put_lanes(a.out[r] + i, mul(silu(acc[0]), acc[1]), n);
    });
  }
}

}  // namespace
