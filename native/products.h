// Products with packed weights, cut into parts for the threads: shared by the entry points and the whole-layer call.
#pragma once

#include "context.h"

namespace freehold {

constexpr int64_t kRows = 16;  // rows that share one reading of the weights

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Units of work for many rows: blocks of rows × tiles of panels. Calls fn(first row, rows, first panel, last panel,
// worker); a block is what one decoded tile of weights serves while it is in the cache.
constexpr int64_t kRowBlock = 256;
template <class Fn>
void each_tile(Context& c, int64_t rows, int64_t panels, int64_t tile, Fn fn) {
  const int64_t tiles = (panels + tile - 1) / tile, blocks = (rows + kRowBlock - 1) / kRowBlock;
  c.pool.each(blocks * tiles, [&](int64_t unit, int worker) {
    const int64_t row = unit / tiles * kRowBlock, first = unit % tiles * tile;
    fn(row, smaller(kRowBlock, rows - row), first, smaller(first + tile, panels), worker);
  });
}

// Several products of at most kRows rows each, as one parallel job.
void few_products(Context& c, const ProductArgs* products, int count);

// One product of any number of rows.
void any_product(Context& c, const ProductArgs& product);

// A SwiGLU MLP: out[m] = down(silu(gate(x[m])) · up(x[m])).
struct Mlp {
  const Matrix *gate, *up, *down;
};
void swiglu(Context& c, const Mlp& mlp, bf16* out, const bf16* x, int64_t x_row, int64_t rows);

// Routed experts: out[r] = Σ_k weights[r][k] · expert ids[r][k] of x[r]. gate_up holds, for each expert, the panels of
// its gate and then those of its up matrix; width is a multiple of kPanel.
struct ExpertsArgs {
  bf16* out;
  const bf16* x;
  int64_t x_row, rows;
  const int64_t* ids;
  const float* weights;
  int64_t top_k, experts, width;
  const Matrix *gate_up, *down;  // stacks of `experts` matrices; paged ones have been brought into memory
};
void experts(Context& c, const ExpertsArgs& args);

// The two halves of kv_b, stacks of one matrix a head: out [rows, heads, rank + rope] = [nope part · W_UK, rope part],
// and out [rows, heads · value] = mixed [rows, heads, rank] · W_UVᵀ.
void absorb(Context& c, bf16* out, const bf16* query, int64_t query_row, int64_t query_head, int64_t rows,
            int64_t heads, int64_t rope, const Matrix& up_key);
void unabsorb(Context& c, bf16* out, const bf16* mixed, int64_t rows, int64_t heads, const Matrix& up_value);

// The chosen experts of each row, from its scores before the sigmoid (which are overwritten).
void route(Context& c, const RouteArgs& args, float* scores, int64_t rows, int64_t* ids, float* weights);

}  // namespace freehold
