#include "products.h"

#include <cstring>

namespace freehold {
namespace {

constexpr int64_t kFewRows = 8;  // of an expert: fewer do not repay decoding its weights to a tile

// The cost of a panel for few rows, in bytes read; rows beyond the first four cost more than reading.
int64_t panel_cost(const Matrix& w, int64_t rows) { return w.panel_bytes() * (1 + rows / 4); }

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Panels of one tile of a product, and of a gated product.
int64_t tile_panels(const Context& c) { return c.kernels.lanes == kPanel ? 2 : 1; }

void few_swiglu(Context& c, const Mlp& mlp, bf16* out, const bf16* x, int64_t x_row, int64_t rows) {
  const int64_t width = mlp.gate->outputs, hidden = mlp.down->outputs;
  bf16* act = reinterpret_cast<bf16*>(c.shared.get(rows * width * 2));
  const bf16* xs[kRows];
  bf16* acts[kRows];
  void* outs[kRows];
  for (int64_t m = 0; m < rows; ++m) xs[m] = x + m * x_row, acts[m] = act + m * width, outs[m] = out + m * hidden;
  const GatedArgs first{mlp.gate, mlp.up, xs, acts, rows};
  c.ranges(mlp.gate->panels(), 1, 2 * panel_cost(*mlp.gate, rows),
           [&](int64_t a, int64_t b, int) { c.kernels.gated(first, a, b); });
  const ProductArgs second{mlp.down, acts, outs, rows, nullptr, false};
  few_products(c, &second, 1);
}

void many_swiglu(Context& c, const Mlp& mlp, bf16* out, const bf16* x, int64_t x_row, int64_t rows) {
  const int64_t width = mlp.gate->outputs, hidden = mlp.down->outputs, act_bytes = aligned(rows * width * 2);
  char* memory = c.shared.get(act_bytes + rows * 3 * int64_t(sizeof(void*)));
  bf16* act = reinterpret_cast<bf16*>(memory);
  auto** xs = reinterpret_cast<const bf16**>(memory + act_bytes);
  auto** acts = reinterpret_cast<bf16**>(memory + act_bytes + rows * sizeof(void*));
  auto** outs = reinterpret_cast<void**>(memory + act_bytes + rows * 2 * sizeof(void*));
  for (int64_t m = 0; m < rows; ++m) xs[m] = x + m * x_row, acts[m] = act + m * width, outs[m] = out + m * hidden;
  c.prepare(larger(2 * gemm_room(*mlp.gate), gemm_room(*mlp.down)));
  each_tile(c, rows, mlp.gate->panels(), 1, [&](int64_t row, int64_t n, int64_t first, int64_t last, int worker) {
    c.kernels.gemm_gated({mlp.gate, mlp.up, xs + row, acts + row, n}, first, last,
                         reinterpret_cast<bf16*>(c.scratch(worker)));
  });
  each_tile(c, rows, mlp.down->panels(), tile_panels(c),
            [&](int64_t row, int64_t n, int64_t first, int64_t last, int worker) {
              c.kernels.gemm({mlp.down, acts + row, outs + row, n, nullptr, false}, first, last,
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
  const ExpertsArgs& a;

  Matrix gate(int64_t e) const { return a.gate_up->at(e).part(0, a.width); }
  Matrix up(int64_t e) const { return a.gate_up->at(e).part(a.width / kPanel, a.width); }
  Matrix down(int64_t e) const { return a.down->at(e); }
  int64_t hidden() const { return a.gate_up->inner; }

  void run() const {
    const int64_t pairs = a.rows * a.top_k, act_bytes = aligned(pairs * a.width * 2);
    const int64_t pointers = pairs * int64_t(sizeof(void*));
    char* memory = c.shared.get(act_bytes + Groups::bytes(pairs, a.experts) + 2 * pointers);
    bf16* act = reinterpret_cast<bf16*>(memory);
    const bool few = a.rows <= kRows;
    const Groups groups(memory + act_bytes, a.ids, pairs, a.experts, few ? kRows : kRowBlock);
    // Inputs and activations in the groups' order.
    memory += act_bytes + Groups::bytes(pairs, a.experts);
    auto** xs = reinterpret_cast<const bf16**>(memory);
    auto** acts = reinterpret_cast<bf16**>(memory + pointers);
    for (int64_t i = 0; i < pairs; ++i) xs[i] = a.x + groups.pairs[i] / a.top_k * a.x_row, acts[i] = act + i * a.width;
    // Of each worker: a block's results, [pairs][block], their places in the groups' order, and decoded weights.
    const int64_t panels = few ? 2 : tile_panels(c), parts_bytes = aligned(pairs * panels * kPanel * 4);
    c.prepare(parts_bytes + aligned(pointers) + larger(2 * gemm_room(*a.gate_up), gemm_room(*a.down)));
    activate(groups, xs, acts, few, parts_bytes + aligned(pointers));
    mix(groups, acts, few, panels, parts_bytes);
  }

  // All activations: units are groups × blocks of an expert's width.
  void activate(const Groups& groups, const bf16* const* xs, bf16* const* acts, bool few, int64_t room_at) const {
    const int64_t block = few ? 4 : 1, panels = a.width / kPanel, blocks = (panels + block - 1) / block;
    c.pool.each(groups.count * blocks, [&](int64_t unit, int worker) {
      const int64_t g = unit / blocks, first = unit % blocks * block, last = smaller(first + block, panels);
      const Matrix gates = gate(groups.expert[g]), ups = up(groups.expert[g]);
      const GatedArgs args{&gates, &ups, xs + groups.first[g], acts + groups.first[g], groups.size(g)};
      if (few || args.rows <= kFewRows) {
        c.kernels.gated(args, first, last);
      } else {
        c.kernels.gemm_gated(args, first, last, reinterpret_cast<bf16*>(c.scratch(worker) + room_at));
      }
    });
  }

  // Blocks of the output, each through all experts; then each token's sum, in the order of its choices.
  void mix(const Groups& groups, bf16* const* acts, bool few, int64_t panels, int64_t places_at) const {
    const int64_t pairs = a.rows * a.top_k, block = panels * kPanel;
    c.pool.each((hidden() + block - 1) / block, [&](int64_t unit, int worker) {
      const int64_t first = unit * block, last = smaller(first + block, hidden());
      char* memory = c.scratch(worker);
      float* parts = reinterpret_cast<float*>(memory);
      auto** places = reinterpret_cast<void**>(memory + places_at);
      auto* room = reinterpret_cast<bf16*>(memory + places_at + aligned(pairs * int64_t(sizeof(void*))));
      for (int64_t i = 0; i < pairs; ++i) places[i] = parts + groups.pairs[i] * block;
      for (int64_t g = 0; g < groups.count; ++g) {
        const Matrix downs = down(groups.expert[g]);
        const ProductArgs args{&downs, acts + groups.first[g], places + groups.first[g], groups.size(g), nullptr, true,
                               first};
        const int64_t p = unit * panels, q = smaller(p + panels, downs.panels());
        if (few || args.rows <= kFewRows) {
          c.kernels.product(args, p, q);
        } else {
          c.kernels.gemm(args, p, q, room);
        }
      }
      for (int64_t row = 0; row < a.rows; ++row) {
        const float* mine[64];
        for (int64_t k = 0; k < a.top_k; ++k) mine[k] = parts + (row * a.top_k + k) * block;
        c.kernels.combine(a.out + row * hidden() + first, mine, a.weights + row * a.top_k, a.top_k, last - first);
      }
    });
  }
};

// One product for each head. x and out: of the head's first row; rows are x_row and out_row values apart.
template <class Rows>
void by_head(Context& c, const Matrix& stack, int64_t heads, int64_t rows, Rows rows_of) {
  const int64_t panels = stack.panels(), block = rows <= kRows ? smaller(panels, 4) : panels;
  const int64_t blocks = (panels + block - 1) / block, row_blocks = (rows + kRowBlock - 1) / kRowBlock;
  c.prepare(gemm_room(stack));
  c.ranges(heads * row_blocks * blocks, 1, block * panel_cost(stack, smaller(rows, kRowBlock)),
           [&](int64_t begin, int64_t end, int worker) {
             for (int64_t unit = begin; unit < end; ++unit) {
               const int64_t head = unit / blocks / row_blocks, row = unit / blocks % row_blocks * kRowBlock;
               const int64_t first = unit % blocks * block, last = smaller(first + block, panels);
               const Matrix w = stack.part(head * panels, stack.outputs);
               const int64_t n = smaller(kRowBlock, rows - row);
               const bf16* xs[kRowBlock];
               void* outs[kRowBlock];
               for (int64_t m = 0; m < n; ++m) rows_of(head, row + m, first == 0, &xs[m], &outs[m]);
               const ProductArgs args{&w, xs, outs, n, nullptr, false};
               if (rows <= kRows) {
                 c.kernels.product(args, first, last);
               } else {
                 c.kernels.gemm(args, first, last, reinterpret_cast<bf16*>(c.scratch(worker)));
               }
             }
           });
}

}  // namespace

void few_products(Context& c, const ProductArgs* products, int count) {
  int64_t panels = 0, cost = 0;
  for (int i = 0; i < count; ++i) {
    panels += products[i].weight->panels();
    cost += products[i].weight->panels() * panel_cost(*products[i].weight, products[i].rows);
  }
  if (panels == 0) return;
  c.ranges(panels, 1, cost / panels, [&](int64_t first, int64_t last, int) {
    int64_t base = 0;
    for (int i = 0; i < count && base < last; ++i) {
      const int64_t mine = products[i].weight->panels();
      const int64_t begin = first > base ? first - base : 0, end = smaller(last - base, mine);
      if (begin < end) c.kernels.product(products[i], begin, end);
      base += mine;
    }
  });
}

void any_product(Context& c, const ProductArgs& a) {
  if (a.rows <= kRows) return few_products(c, &a, 1);
  c.prepare(gemm_room(*a.weight));
  each_tile(c, a.rows, a.weight->panels(), tile_panels(c),
            [&](int64_t row, int64_t n, int64_t first, int64_t last, int worker) {
              ProductArgs part = a;
              part.x = a.x + row, part.out = a.out + row, part.rows = n;
              c.kernels.gemm(part, first, last, reinterpret_cast<bf16*>(c.scratch(worker)));
            });
}

void swiglu(Context& c, const Mlp& mlp, bf16* out, const bf16* x, int64_t x_row, int64_t rows) {
  (rows <= kRows ? few_swiglu : many_swiglu)(c, mlp, out, x, x_row, rows);
}

void experts(Context& c, const ExpertsArgs& args) { Experts{c, args}.run(); }

void absorb(Context& c, bf16* out, const bf16* query, int64_t query_row, int64_t query_head, int64_t rows,
            int64_t heads, int64_t rope, const Matrix& up_key) {
  const int64_t head = up_key.outputs + rope, row = heads * head;
  by_head(c, up_key, heads, rows, [&](int64_t h, int64_t r, bool once, const bf16** x, void** y) {
    *x = query + r * query_row + h * query_head;
    bf16* mine = out + r * row + h * head;
    *y = mine;
    if (once) std::memcpy(mine + up_key.outputs, *x + up_key.inner, size_t(rope) * 2);
  });
}

void unabsorb(Context& c, bf16* out, const bf16* mixed, int64_t rows, int64_t heads, const Matrix& up_value) {
  by_head(c, up_value, heads, rows, [&](int64_t h, int64_t r, bool, const bf16** x, void** y) {
    *x = mixed + (r * heads + h) * up_value.inner;
    *y = out + (r * heads + h) * up_value.outputs;
  });
}

void route(Context& c, const RouteArgs& args, float* scores, int64_t rows, int64_t* ids, float* weights) {
  c.prepare(args.experts * 4);
  c.ranges(rows, 1, args.experts * (args.top_k + 8), [&](int64_t first, int64_t last, int worker) {
    for (int64_t row = first; row < last; ++row)
      c.kernels.route(args, scores + row * args.experts, ids + row * args.top_k, weights + row * args.top_k,
                      reinterpret_cast<uint32_t*>(c.scratch(worker)));
  });
}

}  // namespace freehold
