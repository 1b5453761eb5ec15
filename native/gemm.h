// Products of many rows with packed weights: panels two vectors at a time, decoded to bf16 once for all rows.
//
// Rows are given by pointer, so that experts need no gathered copy. bf16 panels are multiplied where they lie; codes
// are first multiplied by their scales and rounded to bf16, which is exactly the dequantised weight.
#pragma once

#include "panel.h"

namespace {

// Rows of a tile: as many accumulators as there are registers for, two a row.
constexpr int kGemmRows = FH_512 ? 12 : 4, kGemmFewRows = FH_512 ? 4 : 2;
constexpr int64_t kGemmPanels = 2 / kParts;  // panels of two vectors

// Two vectors of outputs: input pair j of them is at a + j · step and b + j · step.
struct Tile {
  const bf16 *a, *b;
  int64_t step;
};

// acc[r][v] = x[r] · outputs of vector v.
template <int R>
FH_INLINE void gemm_tile(const Tile& t, const bf16* const* x, int64_t inner, F (*out)[2]) {
  F acc[R][2];
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = zero();
  const bf16 *a = t.a, *b = t.b;
  for (int64_t k = 0; k < inner; k += 2, a += t.step, b += t.step) {
    const B wa = load(a), wb = load(b);
    for (int r = 0; r < R; ++r) {
      const B v = pair(x[r] + k);
      acc[r][0] = dp(acc[r][0], wa, v);
      acc[r][1] = dp(acc[r][1], wb, v);
    }
  }
  for (int r = 0; r < R; ++r) out[r][0] = acc[r][0], out[r][1] = acc[r][1];
}

// emit(r, acc of both vectors) for every row.
template <class Emit>
FH_INLINE void gemm_rows(const Tile& t, const bf16* const* x, int64_t rows, int64_t inner, Emit emit) {
  F acc[kGemmRows][2];
  int64_t r = 0;
  for (; r + kGemmRows <= rows; r += kGemmRows) {
    gemm_tile<kGemmRows>(t, x + r, inner, acc);
    for (int64_t j = 0; j < kGemmRows; ++j) emit(r + j, acc[j]);
  }
  for (; r < rows; r += kGemmFewRows) {
    const int64_t n = min64(kGemmFewRows, rows - r);
    const bf16* mine[kGemmFewRows];
    for (int j = 0; j < kGemmFewRows; ++j) mine[j] = x[r + min64(j, n - 1)];
    gemm_tile<kGemmFewRows>(t, mine, inner, acc);
    for (int64_t j = 0; j < n; ++j) emit(r + j, acc[j]);
  }
}

// out[j][h] ← the weights of one panel in bf16, pairs `step` values apart.
template <Kind K>
FH_INLINE void unpack(const Matrix& w, int64_t panel, bf16* out, int64_t step) {
  const Tables t = tables<K>();
  const uint8_t* code = w.panel(panel);
  for (int64_t k = 0, group = 0; k < w.inner; ++group) {
    F scale[kParts];
    for (int h = 0; h < kParts; ++h) scale[h] = scale_of<K>(w, panel, group, h);
    for (const int64_t end = min64(k + w.group, w.inner); k < end; k += kChunk, code += kChunkBytes<K>) {
      B weights[kPairs][kParts];
      decode<K>(code, t, weights);
      for (int j = 0; j < kPairs; ++j)
        for (int h = 0; h < kParts; ++h) {
          const F low = mul(even(weights[j][h]), scale[h]), high = mul(odd(weights[j][h]), scale[h]);
          store_bits(out + (k / 2 + j) * step + h * 2 * W, join(round_bf16(low), round_bf16(high)));
        }
    }
  }
}

// The vectors of `panel` (and of the next one, or of `other`, where a panel is one vector).
FH_INLINE Tile tile_of(const Matrix& w, int64_t panel, const Matrix& second, int64_t other, bf16* room) {
  if (w.kind == Kind::kBf16) {
    const bf16* a = reinterpret_cast<const bf16*>(w.panel(panel));
    const bf16* b = kParts == 2 ? a + 2 * W : reinterpret_cast<const bf16*>(second.panel(other));
    return {a, b, kPanel * 2};
  }
  by_kind(w.kind, [&](auto kind) {
    constexpr Kind K = decltype(kind)::value;
    if constexpr (K != Kind::kBf16) {
      unpack<K>(w, panel, room, 4 * W);
      if (kParts == 1) unpack<K>(second, other, room + 2 * W, 4 * W);
    }
  });
  return {room, room + 2 * W, 4 * W};
}

template <class Out>
void gemm_range(const freehold::ProductArgs& a, int64_t first, int64_t last, bf16* room) {
  const Matrix& w = *a.weight;
  for (int64_t panel = first; panel < last; panel += kGemmPanels) {
    const Tile t = tile_of(w, panel, w, min64(panel + 1, w.panels() - 1), room);
    const int64_t o = panel * kPanel, n = w.outputs - o;
    F bias[2] = {zero(), zero()};
    if (a.bias != nullptr) {
      bias[0] = lanes_of(a.bias + o, n);
      if (n > W) bias[1] = lanes_of(a.bias + o + W, n - W);
    }
    const bool both = n > W && (kParts == 2 || panel + 1 < last);
    gemm_rows(t, a.x, a.rows, w.inner, [&](int64_t r, const F* acc) {
      Out* out = static_cast<Out*>(a.out[r]) + (o - a.out_first);
      put_lanes(out, add(acc[0], bias[0]), n);
      if (both) put_lanes(out + W, add(acc[1], bias[1]), n - W);
    });
  }
}

// Like product(), for many rows; room: gemm_room() bytes.
void gemm(const freehold::ProductArgs& a, int64_t first, int64_t last, bf16* room) {
  if (a.out_fp32) return gemm_range<float>(a, first, last, room);
  return gemm_range<bf16>(a, first, last, room);
}

// Like gated(): a vector of gates beside one of ups.
void gemm_gated(const freehold::GatedArgs& a, int64_t first, int64_t last, bf16* room) {
  for (int64_t panel = first; panel < last; ++panel)
    for (int part = 0; part < kParts; ++part) {
      const int64_t o = panel * kPanel + part * W, n = a.gate->outputs - o;
      if (n <= 0) break;
      Tile t;
      if (kParts == 1) {
        t = tile_of(*a.gate, panel, *a.up, panel, room);
      } else {
        // One vector of each: the panels' two vectors lie side by side.
        bf16* second = room + a.gate->inner * kPanel;
        const Tile gate = tile_of(*a.gate, panel, *a.gate, panel, room), up = tile_of(*a.up, panel, *a.up, panel, second);
        t = {part == 0 ? gate.a : gate.b, part == 0 ? up.a : up.b, gate.step};
      }
      gemm_rows(t, a.x, a.rows, a.gate->inner, [&](int64_t r, const F* acc) {
        put_lanes(a.out[r] + o, mul(silu(acc[0]), acc[1]), n);
      });
    }
}

}  // namespace
