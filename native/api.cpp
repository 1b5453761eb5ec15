// The library's entry, projections, norms and rotary embedding: how each call is cut into parts for the threads.
#include "api.h"

#include <cstring>

#include "call.h"

namespace {

using freehold::bf16;
using freehold::call;
using freehold::Context;
using freehold::Kernels;
using freehold::kRows;
using freehold::smaller;

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

namespace {

struct Linear {
  Context& c;
  int kind;
  void* out;
  int64_t out_row;
  const void* x;
  int64_t x_row;
  const void* weight;
  int64_t weight_row, outputs, inner;
  const void* bias;

  int64_t in_size() const { return kind == 2 ? 4 : 2; }
  int64_t out_size() const { return kind == 0 ? 2 : 4; }
  void addresses(int64_t row, int64_t n, const void** xs, void** outs) const {
    for (int64_t m = 0; m < n; ++m) {
      xs[m] = static_cast<const char*>(x) + (row + m) * x_row * in_size();
      outs[m] = static_cast<char*>(out) + (row + m) * out_row * out_size();
    }
  }
  freehold::LinearArgs args(int64_t n, const void* const* xs, void* const* outs) const {
    return {weight, weight_row, inner, xs, outs, n, bias, kind == 2, kind != 0};
  }

  // Every weight is read once; threads take outputs.
  void few(int64_t rows) const {
    const void* xs[kRows];
    void* outs[kRows];
    addresses(0, rows, xs, outs);
    const auto a = args(rows, xs, outs);
    const int64_t cost = inner * in_size() * (1 + rows / 4);
    c.ranges(outputs, 16, cost, [&](int64_t first, int64_t last, int) { c.kernels.linear(a, first, last); });
  }
  // The sums of few(), for any number of rows; threads take rows.
  void blocks(int64_t rows) const {
    c.ranges(rows, kRows, outputs * inner / 2, [&](int64_t first, int64_t last, int) {
      for (int64_t row = first; row < last; row += kRows) {
        const void* xs[kRows];
        void* outs[kRows];
        const int64_t n = smaller(kRows, last - row);
        addresses(row, n, xs, outs);
        c.kernels.linear(args(n, xs, outs), 0, outputs);
      }
    });
  }
  void many(int64_t rows) const {
    char* memory = c.shared.get(rows * 2 * int64_t(sizeof(void*)));
    auto** xs = reinterpret_cast<const void**>(memory);
    auto** outs = reinterpret_cast<void**>(memory + rows * sizeof(void*));
    addresses(0, rows, xs, outs);
    c.prepare(freehold::gemm_scratch(inner));
    freehold::each_tile(c, rows, outputs, 2 * c.kernels.lanes,
                        [&](int64_t row, int64_t n, int64_t first, int64_t last, int worker) {
                          c.kernels.gemm(args(n, xs + row, outs + row), first, last,
                                         reinterpret_cast<bf16*>(c.scratch(worker)));
                        });
  }
};

}  // namespace

int fh_linear(void* context, int kind, void* out, int64_t out_row, const void* x, int64_t x_row, int64_t rows,
              const void* weight, int64_t weight_row, int64_t outputs, int64_t inner, const void* bias) {
  return call(context, [&](Context& c) {
    const Linear linear{c, kind, out, out_row, x, x_row, weight, weight_row, outputs, inner, bias};
    if (rows <= kRows) return linear.few(rows);
    if (kind == 0) return linear.many(rows);
    linear.blocks(rows);
  });
}

int fh_route(void* context, int64_t* ids, float* weights, const void* x, int64_t x_row, int64_t rows,
             const void* weight, int64_t weight_row, int64_t inner, const float* bias, int64_t experts, int64_t top_k,
             int normalise, float scale) {
  return call(context, [&](Context& c) {
    c.prepare((kRows + 1) * experts * 4 + 64);
    const freehold::RouteArgs args{static_cast<const bf16*>(x), x_row, static_cast<const bf16*>(weight), weight_row,
                                   inner, bias, experts, top_k, normalise != 0, scale};
    c.ranges(rows, kRows, experts * inner / 2, [&](int64_t first, int64_t last, int worker) {
      for (int64_t row = first; row < last; row += kRows)
        c.kernels.route(args, row, smaller(row + kRows, last), ids, weights,
                        reinterpret_cast<float*>(c.scratch(worker)));
    });
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

namespace {

// Calls emit(row, rope, room) for each row, normed: what is left is to rotate it. room: for `size` values.
template <class Emit>
void each_cache_row(Context& c, const freehold::NormArgs& norm, const freehold::RopeArgs& rope, int64_t rows,
                    Emit emit) {
  const int64_t size = rope.size, normed = norm.size;
  c.prepare(size * 4 + 64);
  c.ranges(rows, 1, size * 8, [&](int64_t begin, int64_t end, int worker) {
    bf16* values = reinterpret_cast<bf16*>(c.scratch(worker));
    freehold::RopeArgs one = rope;
    one.x = values;
    for (int64_t row = begin; row < end; ++row) {
      c.kernels.norm(norm, row, values);
      std::memcpy(values + normed, norm.x + row * norm.x_row + normed, size_t(size - normed) * 2);
      // One row at a time from its own buffer, hence the tables are moved to the row.
      one.cos = rope.cos + row * (rope.dims / 2), one.sin = rope.sin + row * (rope.dims / 2);
      emit(row, one, values + size);
    }
  });
}

}  // namespace

int fh_write(void* context, void* cache, int64_t cache_row, const int64_t* slots, const void* x, int64_t x_row,
             int64_t rows, int64_t size, int64_t normed, const void* weight, const void* bias, float eps,
             int64_t first, int64_t dims, const float* cos, const float* sin, int interleaved) {
  return call(context, [&](Context& c) {
    const freehold::NormArgs norm{static_cast<const bf16*>(x), x_row, static_cast<const bf16*>(weight),
                                  static_cast<const bf16*>(bias), normed, eps};
    const freehold::RopeArgs rope{nullptr, 0, 0, 1, size, first, dims, cos, sin, interleaved != 0};
    each_cache_row(c, norm, rope, rows, [&](int64_t row, const freehold::RopeArgs& one, bf16*) {
      c.kernels.rope(one, 0, static_cast<bf16*>(cache) + slots[row] * cache_row, 0);
    });
  });
}

int fh_write8(void* context, void* values, int64_t values_row, float* scales, const int64_t* slots, const void* x,
              int64_t x_row, int64_t rows, int64_t size, int64_t normed, const void* weight, const void* bias,
              float eps, int64_t first, int64_t dims, const float* cos, const float* sin, int interleaved) {
  return call(context, [&](Context& c) {
    const freehold::NormArgs norm{static_cast<const bf16*>(x), x_row, static_cast<const bf16*>(weight),
                                  static_cast<const bf16*>(bias), normed, eps};
    const freehold::RopeArgs rope{nullptr, 0, 0, 1, size, first, dims, cos, sin, interleaved != 0};
    each_cache_row(c, norm, rope, rows, [&](int64_t row, const freehold::RopeArgs& one, bf16* rotated) {
      c.kernels.rope(one, 0, rotated, 0);
      scales[slots[row]] = c.kernels.quantise(rotated, size, static_cast<uint8_t*>(values) + slots[row] * values_row);
    });
  });
}
