#include "layers.h"

#include <cstring>

#include "attend.h"
#include "paged.h"
#include "products.h"

namespace freehold {
namespace {

// Memory of one layer's values, cut from one block.
struct Room {
  bf16 *x, *query_latent, *compressed, *index_key, *query, *index_query, *absorbed, *mixed, *values, *y, *shared;
  float *index_weights, *scores, *expert_weights, *next_weights;
  int64_t *ids, *next_ids;

  template <class T>
  static T* take(char*& at, int64_t count) {
    char* mine = at;
    at += aligned(count * int64_t(sizeof(T)));
    return reinterpret_cast<T*>(mine);
  }
  // Lays everything out from `at`, and returns where it ends.
  char* lay_out(char* at, const LayerSizes& s, int64_t rows, int64_t experts) {
    const int64_t head = s.nope + s.rope;
    x = take<bf16>(at, rows * s.hidden);
    query_latent = take<bf16>(at, rows * s.query_rank);
    compressed = take<bf16>(at, rows * (s.rank + s.rope));
    index_key = take<bf16>(at, rows * s.index_dim);
    query = take<bf16>(at, rows * s.heads * head);
    index_query = take<bf16>(at, rows * s.index_heads * s.index_dim);
    absorbed = take<bf16>(at, rows * s.heads * (s.rank + s.rope));
    mixed = take<bf16>(at, rows * s.heads * s.rank);
    values = take<bf16>(at, rows * s.heads * s.value);
    y = take<bf16>(at, rows * s.hidden);
    shared = take<bf16>(at, rows * s.hidden);
    index_weights = take<float>(at, rows * s.index_heads);
    scores = take<float>(at, rows * experts);
    expert_weights = take<float>(at, rows * s.chosen);
    next_weights = take<float>(at, rows * s.chosen);
    ids = take<int64_t>(at, rows * s.chosen);
    next_ids = take<int64_t>(at, rows * s.chosen);
    return at;
  }
};

struct Runner {
  Context& c;
  const LayerSizes& s;
  const LayerStep& step;
  Room room;

  // Several products of the same input rows.
  struct Output {
    const Matrix* weight;
    void* out;
    bool fp32 = false;
  };
  template <int N>
  void project(const bf16* x, int64_t x_row, const Output (&outputs)[N]) const {
    const bf16* xs[kMostRows];
    void* outs[N][kMostRows];
    ProductArgs products[N];
    int count = 0;
    for (int64_t m = 0; m < step.rows; ++m) xs[m] = x + m * x_row;
    for (const Output& o : outputs) {
      if (o.weight == nullptr) continue;
      for (int64_t m = 0; m < step.rows; ++m)
        outs[count][m] = static_cast<char*>(o.out) + m * o.weight->outputs * (o.fp32 ? 4 : 2);
      products[count] = {o.weight, xs, outs[count], step.rows, nullptr, o.fp32};
      ++count;
    }
    if (step.rows <= kRows) {
      few_products(c, products, count);
    } else {
      for (int i = 0; i < count; ++i) any_product(c, products[i]);
    }
    c.clock.mark(Part::kAttentionProject, Part::kIndexerProject, index_share(outputs));
  }

  // The part of the bytes that only the indexer reads: it has the second half of a call's outputs.
  template <int N>
  static double index_share(const Output (&outputs)[N]) {
    double all = 0, index = 0;
    for (int i = 0; i < N; ++i) {
      if (outputs[i].weight == nullptr) continue;
      const double bytes = double(outputs[i].weight->panels() * outputs[i].weight->panel_bytes());
      all += bytes;
      if (N > 1 && i >= N / 2) index += bytes;
    }
    return all > 0 ? index / all : 0;
  }

  // Calls fn(row) for every row, of `size` values.
  template <class Fn>
  void each_row(int64_t size, Fn fn) const {
    c.ranges(step.rows, 1, 8 * size, [&](int64_t first, int64_t last, int) {
      for (int64_t row = first; row < last; ++row) fn(row);
    });
  }

  void norm(bf16* out, const bf16* x, int64_t size, const bf16* weight, double eps) const {
    const NormArgs args{x, size, weight, nullptr, size, float(eps)};
    each_row(size, [&](int64_t row) { c.kernels.norm(args, row, out + row * size); });
  }

  void rotate(bf16* x, int64_t heads, int64_t size, int64_t first, bool interleaved) const {
    const RopeArgs args{x, heads * size, size, heads, size, first, s.rope, step.cos, step.sin, interleaved};
    each_row(heads * size, [&](int64_t row) { c.kernels.rope(args, row, x + row * heads * size, size); });
  }

  // into += x, rounded.
  void add(bf16* into, const bf16* x) const {
    each_row(s.hidden, [&](int64_t row) { c.kernels.accumulate(into + row * s.hidden, x + row * s.hidden, s.hidden); });
  }

  void attention(const LayerWeights& w, bf16* latent, void* keys, float* scales) {
    const int64_t rows = step.rows, latent_dim = s.rank + s.rope;
    norm(room.x, step.hidden, s.hidden, w.input_norm, s.eps);
    c.clock.mark(Part::kNorms);
    project(room.x, s.hidden,
            {{w.query_a, room.query_latent}, {w.latent_a, room.compressed}, {w.index_key, room.index_key},
             {w.index_weights, room.index_weights, true}});
    norm(room.query_latent, room.query_latent, s.query_rank, w.query_norm, s.latent_eps);
    const NormArgs latent_norm{room.compressed, latent_dim, w.latent_norm, nullptr, s.rank, float(s.latent_eps)};
    write_rows(c, latent_norm, {latent, latent_dim, nullptr, step.slots, rows, latent_dim, s.rank, s.rope, step.cos,
                                step.sin, s.interleaved != 0});
    if (w.index_key != nullptr) {
      const NormArgs key_norm{room.index_key, s.index_dim, w.index_norm, w.index_norm_bias, s.index_dim,
                              float(s.index_eps)};
      write_rows(c, key_norm, {keys, s.index_dim, scales, step.slots, rows, s.index_dim, 0, s.rope, step.cos, step.sin,
                               s.index_interleaved != 0});
    }
    c.clock.mark(Part::kAttentionWrite);
    project(room.query_latent, s.query_rank, {{w.query_b, room.query}, {w.index_query, room.index_query}});
    rotate(room.query, s.heads, s.nope + s.rope, s.nope, s.interleaved != 0);
    if (w.index_key != nullptr) select_slots(keys, scales);
    const int64_t head = s.nope + s.rope;
    absorb(c, room.absorbed, room.query, s.heads * head, head, rows, s.heads, s.rope, *w.up_key);
    const AttendArgs args{room.absorbed, s.heads * latent_dim, latent_dim, latent, latent_dim, step.selection,
                          step.width, step.width, -1, s.heads, latent_dim, s.rank, float(s.attention_scale)};
    attend(c, args, room.mixed, rows);
    unabsorb(c, room.values, room.mixed, rows, s.heads, *w.up_value);
    c.clock.mark(Part::kAttend);
    project(room.values, s.heads * s.value, {{w.output, room.y}});
    add(step.hidden, room.y);
  }

  void select_slots(const void* keys, const float* scales) {
    rotate(room.index_query, s.index_heads, s.index_dim, 0, s.index_interleaved != 0);
    const int64_t row = s.index_heads * s.index_dim;
    for (int64_t i = 0; i < step.rows * s.index_heads; ++i) room.index_weights[i] *= float(s.index_scale);
    SelectSpan spans[kMostRows];
    for (int64_t i = 0; i < step.span_count; ++i) {
      const StepSpan& span = step.spans[i];
      spans[i] = {{room.index_query + span.row * row, row, s.index_dim, room.index_weights + span.row * s.index_heads,
                   s.index_heads, s.index_heads, s.index_dim, keys, s.index_dim, scales, span.table, step.block_size,
                   span.start, s.topk},
                  step.selection + span.row * step.width, span.length};
    }
    select_spans(c, spans, step.span_count, step.width);
    c.clock.mark(Part::kIndexerSelect);
  }

  // The experts that a layer's router chooses for room.x.
  void choose(const LayerWeights& w, int64_t* ids, float* weights) const {
    const bf16* xs[kMostRows];
    void* scores[kMostRows];
    for (int64_t m = 0; m < step.rows; ++m) xs[m] = room.x + m * s.hidden, scores[m] = room.scores + m * w.experts;
    const ProductArgs router{w.router, xs, scores, step.rows, nullptr, true};
    any_product(c, router);
    route(c, {w.router_bias, w.experts, s.chosen, s.normalise != 0, float(s.router_scale)}, room.scores, step.rows, ids,
          weights);
  }

  // The layers' inputs differ little, so the next layer's router already names most of the experts it will choose:
  // reading begins, and this layer is computed meanwhile.
  void look_ahead(const LayerWeights& next) const {
    const Paged* paged = next.experts == 0 ? nullptr : next.expert_gate_up->paged;
    if (paged == nullptr || paged->ahead == nullptr) return;
    choose(next, room.next_ids, room.next_weights);
    const int64_t count = step.rows * s.chosen;
    if (any_missing(*paged, room.next_ids, count)) paged->ahead(paged->stack, room.next_ids, count);
  }

  // next: null after the last layer.
  void mlp(const LayerWeights& w, const LayerWeights* next) {
    norm(room.x, step.hidden, s.hidden, w.post_norm, s.eps);
    c.clock.mark(Part::kNorms);
    if (w.experts == 0) {
      swiglu(c, {w.gate, w.up, w.down}, room.y, room.x, s.hidden, step.rows);
      add(step.hidden, room.y);
      return c.clock.mark(Part::kMlp);
    }
    choose(w, room.ids, room.expert_weights);
    c.clock.mark(Part::kRouter);
    bring(w.expert_gate_up->paged, room.ids, step.rows * s.chosen);
    if (next != nullptr) look_ahead(*next);
    experts(c, {room.y, room.x, s.hidden, step.rows, room.ids, room.expert_weights, s.chosen, w.experts,
                s.expert_width, w.expert_gate_up, w.expert_down});
    c.clock.mark(Part::kExperts);
    swiglu(c, {w.gate, w.up, w.down}, room.shared, room.x, s.hidden, step.rows);
    add(room.y, room.shared);
    add(step.hidden, room.y);
    c.clock.mark(Part::kMlp);
  }
};

}  // namespace

void run_layers(Context& c, const LayerSizes& sizes, const LayerWeights* layers, int64_t count, const LayerStep& step) {
  int64_t experts = 0;
  for (int64_t i = 0; i < count; ++i) experts = layers[i].experts > experts ? layers[i].experts : experts;
  Room room;
  char* const nothing = nullptr;
  const int64_t bytes = room.lay_out(nothing, sizes, step.rows, experts) - nothing;
  room.lay_out(c.layer.get(bytes), sizes, step.rows, experts);
  Runner runner{c, sizes, step, room};
  c.clock.start();
  for (int64_t i = 0; i < count; ++i) {
    runner.attention(layers[i], step.latents[i], step.keys[i], step.scales[i]);
    runner.mlp(layers[i], i + 1 < count ? &layers[i + 1] : nullptr);
  }
}

}  // namespace freehold
