// Whole decoder layers in one call, for the rows of a decode step: what a layer is made of, as Python describes it.
//
// The structs are mirrored by freehold/model/ops/fused.py, field by field; every field is 8 bytes.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace freehold {

struct LayerWeights {
  const bf16 *input_norm, *post_norm, *query_norm, *latent_norm;
  const Matrix *query_a, *query_b, *latent_a, *up_key, *up_value, *output;
  // The indexer; null on layers that share another's selection.
  const Matrix *index_query, *index_key, *index_weights;
  const bf16 *index_norm, *index_norm_bias;
  // The dense MLP, or the shared expert.
  const Matrix *gate, *up, *down;
  // Routed experts; `experts` is 0 in a dense layer.
  const Matrix *router, *expert_gate_up, *expert_down;
  const float* router_bias;
  int64_t experts;
};

struct LayerSizes {
  int64_t hidden, query_rank, heads, nope, rope, value, rank;
  int64_t index_heads, index_dim, topk, chosen, expert_width, normalise, interleaved, index_interleaved;
  double eps, latent_eps, index_eps, attention_scale, index_scale, router_scale;
};

// Rows row .. row + length - 1 are positions start .. of the sequence whose blocks are in table.
struct StepSpan {
  int64_t row, length, start;
  const int64_t* table;
};

struct LayerStep {
  bf16* hidden;  // [rows, hidden], in and out
  int64_t rows;
  const float *cos, *sin;  // [rows, rope / 2]
  const int64_t* slots;    // of each row's cache entries
  const StepSpan* spans;
  int64_t span_count, block_size;
  bf16* const* latents;  // of each layer: [slots, rank + rope]
  void* const* keys;     // of each layer: [slots, index_dim], bf16 or FP8; null on shared layers
  float* const* scales;  // of each layer: one for each slot where its keys are FP8, else null
  int64_t* selection;    // [rows, width]: the slots each row attends to; from one layer to the next
  int64_t width;
};

struct Context;

constexpr int64_t kMostRows = 256;

// At most kMostRows rows, in spans of at most kSelectRows. The sums are those of the separate calls, in the same order.
void run_layers(Context& c, const LayerSizes& sizes, const LayerWeights* layers, int64_t count, const LayerStep& step);

}  // namespace freehold
