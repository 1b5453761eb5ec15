// Products of many rows with packed weights: panels two vectors at a time, decoded to bf16 once for all rows.
//
// Rows are given by pointer, so that experts need no gathered copy. bf16 panels are multiplied where they lie. Codes
// become bf16 as they are, and a group's sum is multiplied by its scale in fp32, as for a few rows.
#pragma once

#include "panel.h"

namespace {

// Rows of a tile: as many accumulators as there are registers for, two a row.
constexpr int kGemmRows = FH_512 ? 12 : 4, kGemmFewRows = FH_512 ? 4 : 2;
constexpr int64_t kGemmPanels = 2 / kParts;  // panels of two vectors

// Two vectors of outputs: input pair j of them is at a + j · step and b + j · step. scales: [group][vector][W], or null.
struct Tile {
  const bf16 *a, *b;
  int64_t step, group;
  const float *scale_a, *scale_b;
  int64_t scale_step;
};

// acc[r][v] += x[r] · outputs of vector v, for inputs from `first` to `last`.
template <int R>
FH_INLINE void gemm_span(const Tile& t, const bf16* const* x, int64_t first, int64_t last, F (*acc)[2]) {
  const bf16 *a = t.a + first / 2 * t.step, *b = t.b + first / 2 * t.step;
  for (int64_t k = first; k < last; k += 2, a += t.step, b += t.step) {
    const B wa = load(a), wb = load(b);
    for (int r = 0; r < R; ++r) {
      const B v = pair(x[r] + k);
      acc[r][0] = dp(acc[r][0], wa, v);
      acc[r][1] = dp(acc[r][1], wb, v);
    }
  }
}

template <int R, bool Scaled>
FH_INLINE void gemm_tile(const Tile& t, const bf16* const* x, int64_t inner, F (*out)[2]) {
  F acc[R][2];
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = zero();
  if constexpr (Scaled) {
    const float *sa = t.scale_a, *sb = t.scale_b;
    for (int64_t k = 0; k < inner; k += t.group, sa += t.scale_step, sb += t.scale_step) {
      F part[R][2];
      for (int r = 0; r < R; ++r) part[r][0] = part[r][1] = zero();
      gemm_span<R>(t, x, k, min64(k + t.group, inner), part);
      const F va = load(sa), vb = load(sb);
      for (int r = 0; r < R; ++r) {
        acc[r][0] = fma(va, part[r][0], acc[r][0]);
        acc[r][1] = fma(vb, part[r][1], acc[r][1]);
      }
    }
  } else {
    gemm_span<R>(t, x, 0, inner, acc);
  }
  for (int r = 0; r < R; ++r) out[r][0] = acc[r][0], out[r][1] = acc[r][1];
}

// emit(r, acc of both vectors) for every row.
template <bool Scaled, class Emit>
FH_INLINE void gemm_rows_of(const Tile& t, const bf16* const* x, int64_t rows, int64_t inner, Emit emit) {
  constexpr int kMany = Scaled ? kGemmRows / 2 : kGemmRows, kFew = kGemmFewRows < kMany ? kGemmFewRows : kMany;
  F acc[kMany][2];
  int64_t r = 0;
  for (; r + kMany <= rows; r += kMany) {
    gemm_tile<kMany, Scaled>(t, x + r, inner, acc);
    for (int64_t j = 0; j < kMany; ++j) emit(r + j, acc[j]);
  }
  for (; r < rows; r += kFew) {
    const int64_t n = min64(kFew, rows - r);
    const bf16* mine[kFew];
    for (int j = 0; j < kFew; ++j) mine[j] = x[r + min64(j, n - 1)];
    gemm_tile<kFew, Scaled>(t, mine, inner, acc);
    for (int64_t j = 0; j < n; ++j) emit(r + j, acc[j]);
  }
}
template <class Emit>
FH_INLINE void gemm_rows(const Tile& t, const bf16* const* x, int64_t rows, int64_t inner, Emit emit) {
  if (t.scale_a == nullptr) return gemm_rows_of<false>(t, x, rows, inner, emit);
  gemm_rows_of<true>(t, x, rows, inner, emit);
}

// One panel's codes in bf16, input pairs `step` values apart, and its scales, groups `scale_step` values apart.
template <Kind K>
FH_INLINE void unpack(const Matrix& w, int64_t panel, bf16* out, int64_t step, float* scales, int64_t scale_step) {
  const Tables t = tables<K>();
  const uint8_t* code = w.panel(panel);
  for (int64_t k = 0; k < w.inner; k += kChunk, code += kChunkBytes<K>) {
    B weights[kPairs][kParts];
    decode<K>(code, t, weights);
    for (int j = 0; j < kPairs; ++j)
      for (int h = 0; h < kParts; ++h) store_bits(out + (k / 2 + j) * step + h * 2 * W, weights[j][h]);
  }
  for (int64_t group = 0; group < w.groups(); ++group)
    for (int h = 0; h < kParts; ++h) store(scales + group * scale_step + h * W, scale_of<K>(w, panel, group, h));
}

// The vectors of `panel` (and of panel `other` of `second`, where a panel is one vector).
FH_INLINE Tile tile_of(const Matrix& w, int64_t panel, const Matrix& second, int64_t other, bf16* room) {
  if (w.kind == Kind::kBf16) {
    const bf16* a = reinterpret_cast<const bf16*>(w.panel(panel));
    const bf16* b = kParts == 2 ? a + 2 * W : reinterpret_cast<const bf16*>(second.panel(other));
    return {a, b, kPanel * 2, w.inner, nullptr, nullptr, 0};
  }
  float* scales = reinterpret_cast<float*>(room + w.inner * 2 * W);
  by_kind(w.kind, [&](auto kind) {
    constexpr Kind K = decltype(kind)::value;
    if constexpr (K != Kind::kBf16) {
      unpack<K>(w, panel, room, 4 * W, scales, 2 * W);
      if (kParts == 1) unpack<K>(second, other, room + 2 * W, 4 * W, scales + W, 2 * W);
    }
  });
  return {room, room + 2 * W, 4 * W, w.group, scales, scales + W, 2 * W};
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
        bf16* second = room + freehold::gemm_room(a.gate->inner, a.gate->group) / 2;
        const Tile gate = tile_of(*a.gate, panel, *a.gate, panel, room), up = tile_of(*a.up, panel, *a.up, panel, second);
        t = gate;
        if (part == 1) t.a = gate.b, t.scale_a = gate.scale_b;
        t.b = part == 0 ? up.a : up.b, t.scale_b = part == 0 ? up.scale_a : up.scale_b;
      }
      gemm_rows(t, a.x, a.rows, a.gate->inner, [&](int64_t r, const F* acc) {
        put_lanes(a.out[r] + o, mul(silu(acc[0]), acc[1]), n);
      });
    }
}

}  // namespace
