// The interface that Python loads with ctypes: plain C, pointers and integers.
//
// Matrices are row-major; a `_row` or `_head` argument is the distance between rows in elements, the last dimension is
// contiguous. Values are bf16 unless said. Functions return 0, 1 when memory ran out, or 2 when a paged expert could not
// be read. What each computes is said in freehold/model/ops/interface.py.
#pragma once

#include <cstdint>

#include "layers.h"
#include "matrix.h"

#define FH_API extern "C" __attribute__((visibility("default")))

// Changes with every change of a signature; the Python side refuses another number.
constexpr int kInterfaceVersion = 5;

FH_API int fh_version();
// 1 if this machine can run "avx2", "avx512" or "avx512bf16".
FH_API int fh_supports(const char* isa);
// Null when the instruction set is unknown or not supported. threads counts the caller.
FH_API void* fh_create(int threads, const char* isa);
FH_API void fh_destroy(void* context);

// out = x · weightᵀ (+ bias), in bf16 or, without a bias, in fp32.
FH_API int fh_product(void* context, void* out, int64_t out_row, int out_fp32, const void* x, int64_t x_row,
                      int64_t rows, const freehold::Matrix* weight, const void* bias);
// gate and up are of one kind, group and shape.
FH_API int fh_swiglu(void* context, void* out, const void* x, int64_t x_row, int64_t rows,
                     const freehold::Matrix* gate, const freehold::Matrix* up, const freehold::Matrix* down);
// ids int64 and weights fp32 are [rows, top_k], contiguous. gate_up: for each expert the panels of the gate matrix of
// `width` (a multiple of 16) outputs, then those of the up matrix.
FH_API int fh_experts(void* context, void* out, const void* x, int64_t x_row, int64_t rows, const int64_t* ids,
                      const float* weights, int64_t top_k, int64_t experts, int64_t width,
                      const freehold::Matrix* gate_up, const freehold::Matrix* down);
// scores fp32 [rows, experts]: before the sigmoid; overwritten.
FH_API int fh_route(void* context, int64_t* ids, float* weights, float* scores, int64_t rows, const float* bias,
                    int64_t experts, int64_t top_k, int normalise, float scale);
// bias null: RMSNorm, else LayerNorm. out is contiguous.
FH_API int fh_norm(void* context, void* out, const void* x, int64_t x_row, int64_t rows, int64_t size,
                   const void* weight, const void* bias, float eps);
FH_API int fh_rope(void* context, void* out, const void* x, int64_t x_row, int64_t x_head, int64_t rows,
                   int64_t heads, int64_t size, int64_t first, int64_t dims, const float* cos, const float* sin,
                   int interleaved);
// cache[slots[t]] = norm(x[t][:normed]) with `dims` values from `first` rotated; values past `normed` are not normed.
// scales null: in bf16; else as FP8 E4M3 bytes with a scale for each slot. fp8_rank not 0: as FP8 latent records with
// that many values in 8 bits (kernels.h), cache_row in bytes.
FH_API int fh_write(void* context, void* cache, int64_t cache_row, float* scales, const int64_t* slots, const void* x,
                    int64_t x_row, int64_t rows, int64_t size, int64_t normed, const void* weight, const void* bias,
                    float eps, int64_t first, int64_t dims, const float* cos, const float* sin, int interleaved,
                    int64_t fp8_rank);
// out [count, rank + rope], contiguous: the latents of FP8 records.
FH_API int fh_read(void* context, void* out, const void* records, int64_t record_row, const int64_t* slots,
                   int64_t count, int64_t rank, int64_t rope);
// scales null: keys are bf16; else they are FP8 E4M3 bytes with a scale for each slot.
FH_API int fh_select(void* context, int64_t* out, int64_t out_row, const void* query, int64_t query_row,
                     int64_t query_head, const float* weight, int64_t weight_row, int64_t rows, int64_t heads,
                     int64_t dim, const void* keys, int64_t keys_row, const float* scales, const int64_t* table,
                     int64_t block_size, int64_t start, int64_t topk);
// Negative slots are skipped. start: negative, or row r takes only its first start + r + 1 slots. fp8: latents are FP8
// records, latent_row in bytes.
FH_API int fh_attend(void* context, void* out, const void* query, int64_t query_row, int64_t query_head, int64_t rows,
                     int64_t heads, const void* latent, int64_t latent_row, int64_t latent_dim, int64_t rank,
                     const int64_t* slots, int64_t slots_row, int64_t count, int64_t start, float scale,
                     int fp8);
// out [rows, heads, rank + rope] = [nope part · W_UK, rope part]; out is contiguous. up_key: a matrix of `rank` outputs
// for each head.
FH_API int fh_absorb(void* context, void* out, const void* query, int64_t query_row, int64_t query_head, int64_t rows,
                     int64_t heads, int64_t rope, const freehold::Matrix* up_key);
// out [rows, heads · value] = mixed [rows, heads, rank] · W_UVᵀ; both contiguous.
FH_API int fh_unabsorb(void* context, void* out, const void* mixed, int64_t rows, int64_t heads,
                       const freehold::Matrix* up_value);
// Decoder layers one after the other, for at most kMostRows rows; see layers.h.
FH_API int fh_layers(void* context, const freehold::LayerSizes* sizes, const freehold::LayerWeights* layers,
                     int64_t count, const freehold::LayerStep* step);
// Seconds that fh_layers() spent since the last call, by Part (context.h).
FH_API int fh_clock(void* context, double* seconds);
