// Projections, experts, norms and rotary embedding: how each call is cut into parts for the threads.
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

int fh_linear(void* context, int kind, void* out, int64_t out_row, const void* x, int64_t x_row, int64_t rows,
              const void* weight, int64_t weight_row, int64_t outputs, int64_t inner, const void* bias) {
  return call(context, [&](Context& c) {
    const int64_t in_size = kind == 2 ? 4 : 2, out_size = kind == 0 ? 2 : 4;
    // Many rows: each thread takes rows, and reads the (small) weights from its cache. Few: each takes outputs.
    const int64_t blocks = (rows + kRows - 1) / kRows;
    const auto part = [&](int64_t first_row, int64_t last_row, int64_t first, int64_t last) {
      for (int64_t row = first_row; row < last_row; row += kRows) {
        const void* xs[kRows];
        void* outs[kRows];
        const int64_t n = smaller(kRows, last_row - row);
        for (int64_t m = 0; m < n; ++m) {
          xs[m] = static_cast<const char*>(x) + (row + m) * x_row * in_size;
          outs[m] = static_cast<char*>(out) + (row + m) * out_row * out_size;
        }
        c.kernels.linear({weight, weight_row, inner, xs, outs, n, bias, kind == 2, kind != 0}, first, last);
      }
    };
    if (blocks > 1) {
      c.ranges(rows, kRows, outputs * inner / 2, [&](int64_t a, int64_t b, int) { part(a, b, 0, outputs); });
    } else {
      const int64_t cost = inner * in_size * (1 + rows / 4);
      c.ranges(outputs, 16, cost, [&](int64_t a, int64_t b, int) { part(0, rows, a, b); });
    }
  });
}

int fh_swiglu(void* context, void* out, const void* x, int64_t x_row, int64_t rows, const void* gate,
              int64_t gate_row, const void* up, int64_t up_row, int64_t width, const void* down, int64_t down_row,
              int64_t hidden) {
  return call(context, [&](Context& c) {
    bf16* act = reinterpret_cast<bf16*>(c.shared.get(smaller(rows, kRows) * width * 2));
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t n = smaller(kRows, rows - row), share = 1 + n / 4;
      const void *xs[kRows], *acts_in[kRows];
      bf16* acts[kRows];
      void* outs[kRows];
      for (int64_t m = 0; m < n; ++m) {
        xs[m] = static_cast<const bf16*>(x) + (row + m) * x_row;
        acts_in[m] = acts[m] = act + m * width;
        outs[m] = static_cast<bf16*>(out) + (row + m) * hidden;
      }
      const freehold::GatedArgs gated{static_cast<const bf16*>(gate), static_cast<const bf16*>(up), gate_row, up_row,
                                      hidden, xs, acts, n};
      c.ranges(width, 16, hidden * 4 * share, [&](int64_t a, int64_t b, int) { c.kernels.gated(gated, a, b); });
      const freehold::LinearArgs linear{down, down_row, width, acts_in, outs, n, nullptr, false, false};
      c.ranges(hidden, 16, width * 2 * share, [&](int64_t a, int64_t b, int) { c.kernels.linear(linear, a, b); });
    }
  });
}

namespace {

// Tokens' choices sorted by expert. Pair p is token p / top_k; a group is up to kRows pairs of one expert.
struct Groups {
  int64_t count = 0;
  int32_t *pairs, *first, *expert;  // pairs in order; of group g: [first[g], first[g + 1])

  Groups(char* memory, const int64_t* ids, int64_t total, int64_t experts) {
    int32_t* next = reinterpret_cast<int32_t*>(memory);
    pairs = next + experts + 1, first = pairs + total, expert = first + total + 1;
    std::memset(next, 0, size_t(experts + 1) * 4);
    for (int64_t p = 0; p < total; ++p) ++next[ids[p] + 1];
    for (int64_t e = 0; e < experts; ++e) {
      for (int32_t begin = 0; begin < next[e + 1]; begin += kRows) {
        first[count] = next[e] + begin;
        expert[count++] = int32_t(e);
      }
      next[e + 1] += next[e];
    }
    first[count] = int32_t(total);
    for (int64_t p = 0; p < total; ++p) pairs[next[ids[p]]++] = int32_t(p);
  }
  static int64_t bytes(int64_t total, int64_t experts) { return (experts + 3 * total + 3) * 4 + 64; }
};

}  // namespace

int fh_experts(void* context, void* out, const void* x, int64_t x_row, int64_t rows, const int64_t* ids,
               const float* weights, int64_t top_k, int64_t experts, const void* gate_up, int64_t gate_up_expert,
               const void* down, int64_t down_expert, int64_t hidden, int64_t width) {
  return call(context, [&](Context& c) {
    const int64_t pairs = rows * top_k, act_bytes = (pairs * width * 2 + 63) / 64 * 64;
    const int64_t part_bytes = pairs * hidden * 4;
    char* memory = c.shared.get(act_bytes + part_bytes + Groups::bytes(pairs, experts));
    bf16* act = reinterpret_cast<bf16*>(memory);
    float* parts = reinterpret_cast<float*>(memory + act_bytes);
    const Groups groups(memory + act_bytes + part_bytes, ids, pairs, experts);
    const auto size_of = [&](int64_t g) { return int64_t(groups.first[g + 1] - groups.first[g]); };

    // First all activations: units are groups × blocks of an expert's width.
    constexpr int64_t kBlock = 64;
    const int64_t blocks = (width + kBlock - 1) / kBlock, share = 1 + pairs / (groups.count * 4);
    c.ranges(groups.count * blocks, 1, kBlock * hidden * 4 * share, [&](int64_t begin, int64_t end, int) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t g = unit / blocks, first = unit % blocks * kBlock, n = size_of(g);
        const void* xs[kRows];
        bf16* acts[kRows];
        for (int64_t m = 0; m < n; ++m) {
          const int64_t pair = groups.pairs[groups.first[g] + m];
          xs[m] = static_cast<const bf16*>(x) + pair / top_k * x_row;
          acts[m] = act + pair * width;
        }
        const bf16* base = static_cast<const bf16*>(gate_up) + groups.expert[g] * gate_up_expert;
        c.kernels.gated({base, base + width * hidden, hidden, hidden, hidden, xs, acts, n}, first,
                        smaller(first + kBlock, width));
      }
    });
    // Then ranges of the output, each through all experts, and each token's sum in the order of its choices.
    c.ranges(hidden, 16, groups.count * width * 2 * share, [&](int64_t first, int64_t last, int) {
      for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t n = size_of(g);
        const void* xs[kRows];
        void* outs[kRows];
        for (int64_t m = 0; m < n; ++m) {
          const int64_t pair = groups.pairs[groups.first[g] + m];
          xs[m] = act + pair * width;
          outs[m] = parts + pair * hidden;
        }
        const bf16* base = static_cast<const bf16*>(down) + groups.expert[g] * down_expert;
        c.kernels.linear({base, width, width, xs, outs, n, nullptr, false, true}, first, last);
      }
      for (int64_t row = 0; row < rows; ++row) {
        const float* mine[64];
        for (int64_t k = 0; k < top_k; ++k) mine[k] = parts + (row * top_k + k) * hidden;
        c.kernels.combine(static_cast<bf16*>(out) + row * hidden, mine, weights + row * top_k, top_k, first, last);
      }
    });
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

int fh_write(void* context, void* cache, int64_t cache_row, const int64_t* slots, const void* x, int64_t x_row,
             int64_t rows, int64_t size, int64_t normed, const void* weight, const void* bias, float eps,
             int64_t first, int64_t dims, const float* cos, const float* sin, int interleaved) {
  return call(context, [&](Context& c) {
    c.prepare(size * 2);
    const freehold::NormArgs norm{static_cast<const bf16*>(x), x_row, static_cast<const bf16*>(weight),
                                  static_cast<const bf16*>(bias), normed, eps};
    c.ranges(rows, 1, size * 8, [&](int64_t begin, int64_t end, int worker) {
      bf16* row_values = reinterpret_cast<bf16*>(c.scratch(worker));
      for (int64_t row = begin; row < end; ++row) {
        c.kernels.norm(norm, row, row_values);
        std::memcpy(row_values + normed, norm.x + row * x_row + normed, size_t(size - normed) * 2);
        // One row at a time from its own buffer, hence the tables are moved to the row.
        const freehold::RopeArgs rope{row_values, 0, 0, 1, size, first, dims, cos + row * (dims / 2),
                                      sin + row * (dims / 2), interleaved != 0};
        c.kernels.rope(rope, 0, static_cast<bf16*>(cache) + slots[row] * cache_row, 0);
      }
    });
  });
}

int fh_silu_mul(void* context, void* out, const void* gate, int64_t gate_row, const void* up, int64_t up_row,
                int64_t rows, int64_t width) {
  return call(context, [&](Context& c) {
    c.ranges(rows, 1, width * 8, [&](int64_t first, int64_t last, int) {
      for (int64_t row = first; row < last; ++row)
        c.kernels.silu_mul(static_cast<bf16*>(out) + row * width, static_cast<const bf16*>(gate) + row * gate_row,
                           static_cast<const bf16*>(up) + row * up_row, width);
    });
  });
}

int fh_combine(void* context, void* out, const void* parts, const int64_t* where, const float* weights, int64_t rows,
               int64_t top_k, int64_t hidden) {
  return call(context, [&](Context& c) {
    c.ranges(rows, 1, hidden * 2 * top_k, [&](int64_t first, int64_t last, int) {
      for (int64_t row = first; row < last; ++row) {
        const bf16* mine[64];
        for (int64_t k = 0; k < top_k; ++k)
          mine[k] = static_cast<const bf16*>(parts) + where[row * top_k + k] * hidden;
        c.kernels.combine_bf16(static_cast<bf16*>(out) + row * hidden, mine, weights + row * top_k, top_k, hidden);
      }
    });
  });
}
