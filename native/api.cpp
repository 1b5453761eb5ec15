// The library's entry: every call of api.h, with its pointers made into the arguments of the work behind it.
#include "api.h"

#include <cstring>

#include "attend.h"
#include "call.h"
#include "layers.h"
#include "products.h"

namespace {

using freehold::AttendArgs;
using freehold::bf16;
using freehold::call;
using freehold::Context;
using freehold::Kernels;
using freehold::kRows;
using freehold::SelectArgs;

const Kernels* table_of(const char* isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(isa, "avx2") && avx2) return &freehold::kernels_avx2;
  if (!std::strcmp(isa, "avx512") && avx512) return &freehold::kernels_avx512;
  if (!std::strcmp(isa, "avx512bf16") && avx512 && __builtin_cpu_supports("avx512bf16"))
    return &freehold::kernels_avx512bf16;
  return nullptr;
}

}  // namespace

int fh_version() { return kInterfaceVersion; }

int fh_supports(const char* isa) { return table_of(isa) != nullptr; }

void* fh_create(int threads, const char* isa) {
  const Kernels* table = table_of(isa);
  if (table == nullptr) return nullptr;
  try {
    return new Context(threads, table);
  } catch (...) {
    return nullptr;
  }
}

void fh_destroy(void* context) { delete static_cast<Context*>(context); }

int fh_product(void* context, void* out, int64_t out_row, int out_fp32, const void* x, int64_t x_row, int64_t rows,
               const freehold::Matrix* weight, const void* bias) {
  return call(context, [&](Context& c) {
    const bf16* few[kRows];
    void* few_outs[kRows];
    const bf16** xs = few;
    void** outs = few_outs;
    if (rows > kRows) {
      char* memory = c.shared.get(rows * 2 * int64_t(sizeof(void*)));
      xs = reinterpret_cast<const bf16**>(memory);
      outs = reinterpret_cast<void**>(memory + rows * sizeof(void*));
    }
    for (int64_t m = 0; m < rows; ++m) {
      xs[m] = static_cast<const bf16*>(x) + m * x_row;
      outs[m] = static_cast<char*>(out) + m * out_row * (out_fp32 ? 4 : 2);
    }
    freehold::any_product(c, {weight, xs, outs, rows, static_cast<const bf16*>(bias), out_fp32 != 0});
  });
}

int fh_swiglu(void* context, void* out, const void* x, int64_t x_row, int64_t rows, const freehold::Matrix* gate,
              const freehold::Matrix* up, const freehold::Matrix* down) {
  return call(context, [&](Context& c) {
    freehold::swiglu(c, {gate, up, down}, static_cast<bf16*>(out), static_cast<const bf16*>(x), x_row, rows);
  });
}

int fh_experts(void* context, void* out, const void* x, int64_t x_row, int64_t rows, const int64_t* ids,
               const float* weights, int64_t top_k, int64_t experts, int64_t width, const freehold::Matrix* gate_up,
               const freehold::Matrix* down) {
  return call(context, [&](Context& c) {
    freehold::bring(gate_up->paged, ids, rows * top_k);
    freehold::experts(c, {static_cast<bf16*>(out), static_cast<const bf16*>(x), x_row, rows, ids, weights, top_k,
                          experts, width, gate_up, down});
  });
}

int fh_route(void* context, int64_t* ids, float* weights, float* scores, int64_t rows, const float* bias,
             int64_t experts, int64_t top_k, int normalise, float scale) {
  return call(context, [&](Context& c) {
    freehold::route(c, {bias, experts, top_k, normalise != 0, scale}, scores, rows, ids, weights);
  });
}

int fh_absorb(void* context, void* out, const void* query, int64_t query_row, int64_t query_head, int64_t rows,
              int64_t heads, int64_t rope, const freehold::Matrix* up_key) {
  return call(context, [&](Context& c) {
    freehold::absorb(c, static_cast<bf16*>(out), static_cast<const bf16*>(query), query_row, query_head, rows, heads,
                     rope, *up_key);
  });
}

int fh_unabsorb(void* context, void* out, const void* mixed, int64_t rows, int64_t heads,
                const freehold::Matrix* up_value) {
  return call(context, [&](Context& c) {
    freehold::unabsorb(c, static_cast<bf16*>(out), static_cast<const bf16*>(mixed), rows, heads, *up_value);
  });
}

int fh_norm(void* context, void* out, const void* x, int64_t x_row, int64_t rows, int64_t size, const void* weight,
            const void* bias, float eps) {
  return call(context, [&](Context& c) {
    const freehold::NormArgs args{static_cast<const bf16*>(x), x_row, static_cast<const bf16*>(weight),
                                  static_cast<const bf16*>(bias), size, eps};
    c.ranges(rows, 1, size * 4, [&](int64_t first, int64_t last, int) {
      for (int64_t row = first; row < last; ++row) c.kernels.norm(args, row, static_cast<bf16*>(out) + row * size);
    });
  });
}

int fh_rope(void* context, void* out, const void* x, int64_t x_row, int64_t x_head, int64_t rows, int64_t heads,
            int64_t size, int64_t first, int64_t dims, const float* cos, const float* sin, int interleaved) {
  return call(context, [&](Context& c) {
    const freehold::RopeArgs args{static_cast<const bf16*>(x), x_row, x_head, heads, size, first, dims, cos, sin,
                                  interleaved != 0};
    c.ranges(rows, 1, heads * (size + dims * 4), [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row)
        c.kernels.rope(args, row, static_cast<bf16*>(out) + row * heads * size, size);
    });
  });
}

int fh_write(void* context, void* cache, int64_t cache_row, float* scales, const int64_t* slots, const void* x,
             int64_t x_row, int64_t rows, int64_t size, int64_t normed, const void* weight, const void* bias, float eps,
             int64_t first, int64_t dims, const float* cos, const float* sin, int interleaved, int64_t fp8_rank) {
  return call(context, [&](Context& c) {
    const freehold::NormArgs norm{static_cast<const bf16*>(x), x_row, static_cast<const bf16*>(weight),
                                  static_cast<const bf16*>(bias), normed, eps};
    freehold::write_rows(
        c, norm, {cache, cache_row, scales, slots, rows, size, first, dims, cos, sin, interleaved != 0, fp8_rank});
  });
}

int fh_read(void* context, void* out, const void* records, int64_t record_row, const int64_t* slots, int64_t count,
            int64_t rank, int64_t rope) {
  return call(context, [&](Context& c) {
    c.ranges(count, 1, rank + rope, [&](int64_t first, int64_t last, int) {
      for (int64_t i = first; i < last; ++i)
        c.kernels.widen_latent(static_cast<const uint8_t*>(records) + slots[i] * record_row, rank, rope,
                               static_cast<bf16*>(out) + i * (rank + rope));
    });
  });
}

int fh_select(void* context, int64_t* out, int64_t out_row, const void* query, int64_t query_row, int64_t query_head,
              const float* weight, int64_t weight_row, int64_t rows, int64_t heads, int64_t dim, const void* keys,
              int64_t keys_row, const float* scales, const int64_t* table, int64_t block_size, int64_t start,
              int64_t topk) {
  return call(context, [&](Context& c) {
    const SelectArgs args{static_cast<const bf16*>(query), query_row, query_head, weight, weight_row, heads, dim,
                          keys, keys_row, scales, table, block_size, start, topk};
    freehold::select(c, args, out, out_row, rows);
  });
}

int fh_attend(void* context, void* out, const void* query, int64_t query_row, int64_t query_head, int64_t rows,
              int64_t heads, const void* latent, int64_t latent_row, int64_t latent_dim, int64_t rank,
              const int64_t* slots, int64_t slots_row, int64_t count, int64_t start, float scale, int fp8) {
  return call(context, [&](Context& c) {
    const AttendArgs args{static_cast<const bf16*>(query), query_row, query_head, latent, latent_row, slots,
                          slots_row, count, start, heads, latent_dim, rank, scale, fp8 != 0};
    freehold::attend(c, args, static_cast<bf16*>(out), rows);
  });
}

int fh_layers(void* context, const freehold::LayerSizes* sizes, const freehold::LayerWeights* layers, int64_t count,
              const freehold::LayerStep* step) {
  return call(context, [&](Context& c) { freehold::run_layers(c, *sizes, layers, count, *step); });
}

int fh_clock(void* context, double* seconds) {
  return call(context, [&](Context& c) { c.clock.take(seconds); });
}
