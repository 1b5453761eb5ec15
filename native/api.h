// The interface that Python loads with ctypes: plain C, pointers and integers.
//
// Matrices are row-major; a `_row` or `_head` argument is the distance between rows in elements, the last dimension is
// contiguous. Values are bf16 unless said. Functions return 0, or 1 when memory ran out.
// What each computes is said in freehold/model/ops/interface.py.
#pragma once

#include <cstdint>

#define FH_API extern "C" __attribute__((visibility("default")))

// Changes with every change of a signature; the Python side refuses another number.
constexpr int kInterfaceVersion = 2;

FH_API int fh_version();
// 1 if this machine can run "avx2", "avx512" or "avx512bf16".
FH_API int fh_supports(const char* isa);
// Null when the instruction set is unknown or not supported. threads counts the caller.
FH_API void* fh_create(int threads, const char* isa);
FH_API void fh_destroy(void* context);

// kind 0: bf16; 1: bf16 with fp32 output and bias; 2: all fp32.
FH_API int fh_linear(void* context, int kind, void* out, int64_t out_row, const void* x, int64_t x_row, int64_t rows,
                     const void* weight, int64_t weight_row, int64_t outputs, int64_t inner, const void* bias);
FH_API int fh_swiglu(void* context, void* out, const void* x, int64_t x_row, int64_t rows, const void* gate,
                     int64_t gate_row, const void* up, int64_t up_row, int64_t width, const void* down,
                     int64_t down_row, int64_t hidden);
// ids int64 and weights fp32 are [rows, top_k], contiguous.
FH_API int fh_experts(void* context, void* out, const void* x, int64_t x_row, int64_t rows, const int64_t* ids,
                      const float* weights, int64_t top_k, int64_t experts, const void* gate_up,
                      int64_t gate_up_expert, const void* down, int64_t down_expert, int64_t hidden, int64_t width);
FH_API int fh_route(void* context, int64_t* ids, float* weights, const void* x, int64_t x_row, int64_t rows,
                    const void* weight, int64_t weight_row, int64_t inner, const float* bias, int64_t experts,
                    int64_t top_k, int normalise, float scale);
// bias null: RMSNorm, else LayerNorm. out is contiguous.
FH_API int fh_norm(void* context, void* out, const void* x, int64_t x_row, int64_t rows, int64_t size,
                   const void* weight, const void* bias, float eps);
FH_API int fh_rope(void* context, void* out, const void* x, int64_t x_row, int64_t x_head, int64_t rows,
                   int64_t heads, int64_t size, int64_t first, int64_t dims, const float* cos, const float* sin,
                   int interleaved);
// cache[slots[t]] = norm(x[t][:normed]) with `dims` values from `first` rotated; values past `normed` are not normed.
FH_API int fh_write(void* context, void* cache, int64_t cache_row, const int64_t* slots, const void* x, int64_t x_row,
                    int64_t rows, int64_t size, int64_t normed, const void* weight, const void* bias, float eps,
                    int64_t first, int64_t dims, const float* cos, const float* sin, int interleaved);
// The same, and the row is then stored as FP8 E4M3 bytes with one scale a row.
FH_API int fh_write8(void* context, void* values, int64_t values_row, float* scales, const int64_t* slots,
                     const void* x, int64_t x_row, int64_t rows, int64_t size, int64_t normed, const void* weight,
                     const void* bias, float eps, int64_t first, int64_t dims, const float* cos, const float* sin,
                     int interleaved);
// scales null: keys are bf16; else they are FP8 E4M3 bytes with a scale for each slot.
FH_API int fh_select(void* context, int64_t* out, int64_t out_row, const void* query, int64_t query_row,
                     int64_t query_head, const float* weight, int64_t weight_row, int64_t rows, int64_t heads,
                     int64_t dim, const void* keys, int64_t keys_row, const float* scales, const int64_t* table,
                     int64_t block_size, int64_t start, int64_t topk);
// Negative slots are skipped. start: negative, or row r takes only its first start + r + 1 slots.
FH_API int fh_attend(void* context, void* out, const void* query, int64_t query_row, int64_t query_head, int64_t rows,
                     int64_t heads, const void* latent, int64_t latent_row, int64_t latent_dim, int64_t rank,
                     const int64_t* slots, int64_t slots_row, int64_t count, int64_t start, float scale);
// out [rows, heads, rank + rope] = [nope part · W_UK, rope part]; out is contiguous.
FH_API int fh_absorb(void* context, void* out, const void* query, int64_t query_row, int64_t query_head, int64_t rows,
                     int64_t heads, int64_t nope, int64_t rope, const void* kv_b, int64_t kv_b_row, int64_t value,
                     int64_t rank);
// out [rows, heads · value] = mixed [rows, heads, rank] · W_UVᵀ; both contiguous.
FH_API int fh_unabsorb(void* context, void* out, const void* mixed, int64_t rows, int64_t heads, int64_t nope,
                       int64_t value, int64_t rank, const void* kv_b, int64_t kv_b_row);
