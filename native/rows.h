// Norms, rotary embedding and the router: a row at a time, in fp32, rounded where the reference is.
#pragma once

#include "dot.h"
#include "select.h"

namespace {

using freehold::NormArgs;
using freehold::RopeArgs;
using freehold::RouteArgs;

void rms_norm_row(const bf16* x, const bf16* weight, int64_t size, float eps, bf16* out) {
  F squares = zero();
  for (int64_t i = 0; i < size; i += W) {
    const F v = widen(x + i, min64(W, size - i));
    squares = fma(v, v, squares);
  }
  const F scale = all(1.0f / __builtin_sqrtf(sum(squares) / float(size) + eps));
  for (int64_t i = 0; i < size; i += W) {
    const int64_t n = min64(W, size - i);
    // The normed value is rounded before the weight multiplies it.
    narrow(out + i, mul(widen(weight + i, n), round_bf16(mul(widen(x + i, n), scale))), n);
  }
}

void layer_norm_row(const bf16* x, const bf16* weight, const bf16* bias, int64_t size, float eps, bf16* out) {
  F total = zero();
  for (int64_t i = 0; i < size; i += W) total = add(total, widen(x + i, min64(W, size - i)));
  const float mean = sum(total) / float(size);
  F squares = zero();
  for (int64_t i = 0; i < size; i += W) {
    const int64_t n = min64(W, size - i);
    const F v = sub(widen(x + i, n), all(mean));
    // Lanes past the end hold -mean and must not count.
    alignas(64) float t[W];
    store(t, v);
    const F kept = load(t, n);
    squares = fma(kept, kept, squares);
  }
  const F scale = all(1.0f / __builtin_sqrtf(sum(squares) / float(size) + eps));
  for (int64_t i = 0; i < size; i += W) {
    const int64_t n = min64(W, size - i);
    const F v = mul(sub(widen(x + i, n), all(mean)), scale);
    narrow(out + i, fma(v, widen(weight + i, n), widen(bias + i, n)), n);
  }
}

void norm(const NormArgs& a, int64_t row, bf16* out) {
  const bf16* x = a.x + row * a.x_row;
  if (a.bias != nullptr) return layer_norm_row(x, a.weight, a.bias, a.size, a.eps, out);
  return rms_norm_row(x, a.weight, a.size, a.eps, out);
}

void rope(const RopeArgs& a, int64_t row, bf16* out, int64_t out_head) {
  const int64_t half = a.dims / 2, end = a.first + a.dims;
  const float *cosine = a.cos + row * half, *sine = a.sin + row * half;
  // Where the two values of pair j lie.
  const int64_t step = a.interleaved ? 2 : 1, other = a.interleaved ? 1 : half;
  for (int64_t h = 0; h < a.heads; ++h) {
    const bf16* x = a.x + row * a.x_row + h * a.x_head;
    bf16* y = out + h * out_head;
    if (x != y) {
      memcpy(y, x, size_t(a.first) * 2);
      memcpy(y + end, x + end, size_t(a.size - end) * 2);
    }
    x += a.first, y += a.first;
    for (int64_t j = 0; j < half; ++j) {
      const float u = widen(x[j * step]), v = widen(x[j * step + other]), c = cosine[j], s = sine[j];
      y[j * step] = narrow(u * c - v * s);
      y[j * step + other] = narrow(v * c + u * s);
    }
  }
}

void route(const RouteArgs& a, float* scores, int64_t* ids, float* weights, uint32_t* keys) {
  for (int64_t e = 0; e < a.experts; e += W) {
    const int64_t n = min64(W, a.experts - e);
    store(scores + e, sigmoid(load(scores + e, n)), n);
  }
  for (int64_t e = 0; e < a.experts; ++e) keys[e] = sortable(scores[e] + a.bias[e] + 0.0f);
  float total = 0.0f;
  for (int64_t k = 0; k < a.top_k; ++k) {
    int64_t best = 0;
    for (int64_t e = 1; e < a.experts; ++e) best = keys[e] > keys[best] ? e : best;
    keys[best] = 0;  // below every score's key
    ids[k] = best;
    weights[k] = scores[best];
    total += scores[best];
  }
  const float divisor = a.normalise ? total + 1e-20f : 1.0f;
  for (int64_t k = 0; k < a.top_k; ++k) weights[k] = weights[k] / divisor * a.scale;
}

}  // namespace
