// The dense MLP and the routed experts: for a few rows weights are read once, for many they are packed and multiplied.
#include <cstring>

#include "api.h"
#include "call.h"

namespace {

using freehold::bf16;
using freehold::call;
using freehold::Context;
using freehold::kRowBlock;
using freehold::kRows;
using freehold::smaller;

constexpr int64_t kFewRows = 8;  // of an expert: fewer do not repay packing its weights

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The weights of one SwiGLU MLP; all its matrices have contiguous or evenly strided rows.
struct Mlp {
  const bf16 *gate, *up, *down;
  int64_t gate_row, up_row, down_row, hidden, width;

  freehold::GatedArgs first(const void* const* x, bf16* const* act, int64_t rows) const {
    return {gate, up, gate_row, up_row, hidden, x, act, rows};
  }
  freehold::LinearArgs second(const void* const* act, void* const* out, int64_t rows, bool fp32, int64_t from) const {
    return {down, down_row, width, act, out, rows, nullptr, false, fp32, from};
  }
};

void small_swiglu(Context& c, const Mlp& mlp, bf16* out, const bf16* x, int64_t x_row, int64_t rows) {
  bf16* act = reinterpret_cast<bf16*>(c.shared.get(rows * mlp.width * 2));
  const int64_t share = 1 + rows / 4;
  const void *xs[kRows], *acts_in[kRows];
  bf16* acts[kRows];
  void* outs[kRows];
  for (int64_t m = 0; m < rows; ++m) {
    xs[m] = x + m * x_row;
    acts_in[m] = acts[m] = act + m * mlp.width;
    outs[m] = out + m * mlp.hidden;
  }
  const auto first = mlp.first(xs, acts, rows);
  c.ranges(mlp.width, 16, mlp.hidden * 4 * share, [&](int64_t a, int64_t b, int) { c.kernels.gated(first, a, b); });
  const auto second = mlp.second(acts_in, outs, rows, false, 0);
  c.ranges(mlp.hidden, 16, mlp.width * 2 * share, [&](int64_t a, int64_t b, int) { c.kernels.linear(second, a, b); });
}

void large_swiglu(Context& c, const Mlp& mlp, bf16* out, const bf16* x, int64_t x_row, int64_t rows) {
  const int64_t act_bytes = aligned(rows * mlp.width * 2), lanes = c.kernels.lanes;
  char* memory = c.shared.get(act_bytes + rows * 3 * int64_t(sizeof(void*)));
  bf16* act = reinterpret_cast<bf16*>(memory);
  memory += act_bytes;
  auto** xs = reinterpret_cast<const void**>(memory);
  auto** acts = reinterpret_cast<bf16**>(memory + rows * sizeof(void*));
  auto** outs = reinterpret_cast<void**>(memory + rows * 2 * sizeof(void*));
  for (int64_t m = 0; m < rows; ++m) xs[m] = x + m * x_row, acts[m] = act + m * mlp.width, outs[m] = out + m * mlp.hidden;
  c.prepare(freehold::gemm_scratch(mlp.hidden > mlp.width ? mlp.hidden : mlp.width));
  freehold::each_tile(c, rows, mlp.width, lanes, [&](int64_t row, int64_t n, int64_t first, int64_t last, int worker) {
    c.kernels.gemm_gated(mlp.first(xs + row, acts + row, n), first, last, reinterpret_cast<bf16*>(c.scratch(worker)));
  });
  freehold::each_tile(c, rows, mlp.hidden, 2 * lanes, [&](int64_t row, int64_t n, int64_t first, int64_t last,
                                                          int worker) {
    c.kernels.gemm(mlp.second(reinterpret_cast<const void* const*>(acts + row), outs + row, n, false, 0), first, last,
                   reinterpret_cast<bf16*>(c.scratch(worker)));
  });
}

// Tokens' choices sorted by expert. Pair p is token p / top_k; a group is up to `most` pairs of one expert.
struct Groups {
  int64_t count = 0;
  int32_t *pairs, *first, *expert;  // pairs in order; of group g: [first[g], first[g + 1])

  Groups(char* memory, const int64_t* ids, int64_t total, int64_t experts, int64_t most) {
    int32_t* next = reinterpret_cast<int32_t*>(memory);
    pairs = next + experts + 1, first = pairs + total, expert = first + total + 1;
    std::memset(next, 0, size_t(experts + 1) * 4);
    for (int64_t p = 0; p < total; ++p) ++next[ids[p] + 1];
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t begin = 0; begin < next[e + 1]; begin += most) {
        first[count] = next[e] + int32_t(begin);
        expert[count++] = int32_t(e);
      }
      next[e + 1] += next[e];
    }
    first[count] = int32_t(total);
    for (int64_t p = 0; p < total; ++p) pairs[next[ids[p]]++] = int32_t(p);
  }
  int64_t size(int64_t g) const { return first[g + 1] - first[g]; }
  static int64_t bytes(int64_t total, int64_t experts) { return aligned((experts + 3 * total + 3) * 4); }
};

struct Experts {
  Context& c;
  bf16* out;
  const bf16* x;
  int64_t x_row, rows;
  const int64_t* ids;
  const float* weights;
  int64_t top_k, experts;
  const bf16 *gate_up, *down;
  int64_t gate_up_expert, down_expert, hidden, width;

  Mlp mlp(int64_t e) const {
    const bf16* gate = gate_up + e * gate_up_expert;
    return {gate, gate + width * hidden, down + e * down_expert, hidden, hidden, width, hidden, width};
  }

  void run() const {
    const int64_t pairs = rows * top_k, act_bytes = aligned(pairs * width * 2);
    const int64_t pointers = pairs * int64_t(sizeof(void*));
    char* memory = c.shared.get(act_bytes + Groups::bytes(pairs, experts) + 2 * pointers);
    bf16* act = reinterpret_cast<bf16*>(memory);
    const bool few = rows <= kRows;
    const Groups groups(memory + act_bytes, ids, pairs, experts, few ? kRows : kRowBlock);
    // Inputs and activations in the groups' order.
    memory += act_bytes + Groups::bytes(pairs, experts);
    auto** xs = reinterpret_cast<const void**>(memory);
    auto** acts = reinterpret_cast<bf16**>(memory + pointers);
    for (int64_t i = 0; i < pairs; ++i) xs[i] = x + groups.pairs[i] / top_k * x_row, acts[i] = act + i * width;
    // Of each worker: a block's results, [pairs][block], their places in the groups' order, and packed weights.
    const int64_t block = few ? 64 : 2 * c.kernels.lanes, parts_bytes = aligned(pairs * block * 4);
    c.prepare(parts_bytes + aligned(pointers) + freehold::gemm_scratch(hidden > width ? hidden : width));
    activate(groups, xs, acts, few, parts_bytes + aligned(pointers));
    mix(groups, acts, few, block, parts_bytes);
  }

  // All activations: units are groups × blocks of an expert's width.
  void activate(const Groups& groups, const void* const* xs, bf16* const* acts, bool few, int64_t packed_at) const {
    const int64_t block = few ? 64 : c.kernels.lanes, blocks = (width + block - 1) / block;
    c.pool.each(groups.count * blocks, [&](int64_t unit, int worker) {
      const int64_t g = unit / blocks, first = unit % blocks * block, last = smaller(first + block, width);
      const auto args = mlp(groups.expert[g]).first(xs + groups.first[g], acts + groups.first[g], groups.size(g));
      if (groups.size(g) <= kFewRows || few) {
        c.kernels.gated(args, first, last);
      } else {
        c.kernels.gemm_gated(args, first, last, reinterpret_cast<bf16*>(c.scratch(worker) + packed_at));
      }
    });
  }

  // Blocks of the output, each through all experts; then each token's sum, in the order of its choices.
  void mix(const Groups& groups, bf16* const* acts, bool few, int64_t block, int64_t places_at) const {
    const int64_t pairs = rows * top_k;
    c.pool.each((hidden + block - 1) / block, [&](int64_t unit, int worker) {
      const int64_t first = unit * block, last = smaller(first + block, hidden);
      char* memory = c.scratch(worker);
      float* parts = reinterpret_cast<float*>(memory);
      auto** places = reinterpret_cast<void**>(memory + places_at);
      auto* packed = reinterpret_cast<bf16*>(memory + places_at + aligned(pairs * int64_t(sizeof(void*))));
      for (int64_t i = 0; i < pairs; ++i) places[i] = parts + groups.pairs[i] * block;
      for (int64_t g = 0; g < groups.count; ++g) {
        const auto args = mlp(groups.expert[g])
                              .second(reinterpret_cast<const void* const*>(acts + groups.first[g]),
                                      places + groups.first[g], groups.size(g), true, first);
        if (groups.size(g) <= kFewRows || few) {
          c.kernels.linear(args, first, last);
        } else {
          c.kernels.gemm(args, first, last, packed);
        }
      }
      for (int64_t row = 0; row < rows; ++row) {
        const float* mine[64];
        for (int64_t k = 0; k < top_k; ++k) mine[k] = parts + (row * top_k + k) * block;
        c.kernels.combine(out + row * hidden + first, mine, weights + row * top_k, top_k, last - first);
      }
    });
  }
};

}  // namespace

int fh_swiglu(void* context, void* out, const void* x, int64_t x_row, int64_t rows, const void* gate,
              int64_t gate_row, const void* up, int64_t up_row, int64_t width, const void* down, int64_t down_row,
              int64_t hidden) {
  return call(context, [&](Context& c) {
    const Mlp mlp{static_cast<const bf16*>(gate), static_cast<const bf16*>(up), static_cast<const bf16*>(down),
                  gate_row, up_row, down_row, hidden, width};
    (rows <= kRows ? small_swiglu : large_swiglu)(c, mlp, static_cast<bf16*>(out), static_cast<const bf16*>(x), x_row,
                                                  rows);
  });
}

int fh_experts(void* context, void* out, const void* x, int64_t x_row, int64_t rows, const int64_t* ids,
               const float* weights, int64_t top_k, int64_t experts, const void* gate_up, int64_t gate_up_expert,
               const void* down, int64_t down_expert, int64_t hidden, int64_t width) {
  return call(context, [&](Context& c) {
    Experts{c, static_cast<bf16*>(out), static_cast<const bf16*>(x), x_row, rows, ids, weights, top_k, experts,
            static_cast<const bf16*>(gate_up), static_cast<const bf16*>(down), gate_up_expert, down_expert, hidden,
            width}
        .run();
  });
}
