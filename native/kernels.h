// The kernels of one instruction set, as a table of functions: what api.cpp may call, and nothing else.
//
// A kernel works on a range that its caller chose and is single-threaded. Every output is reduced in one order that
// depends on neither the range nor how many rows come together, so threads and batches never change a result.
// Pointers are to bf16 (uint16_t) unless said; strides are in elements.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace freehold {

using bf16 = uint16_t;

// y[m][o] = x[m] · weight[o] (+ bias[o]) with a packed weight; rows are given by pointer so that experts can
// gather without copying. Ranges are of panels.
struct ProductArgs {
  const Matrix* weight;
  const bf16* const* x;
  void* const* out;
  int64_t rows;
  const bf16* bias;  // or null
  bool out_fp32;
  int64_t out_first = 0;  // the output that out[m][0] is
};

// act[m][i] = silu(x[m] · gate[i]) · (x[m] · up[i]), bf16; at most 16 rows but for gemm_gated. gate and up are of one
// kind, group and shape; ranges are of panels.
struct GatedArgs {
  const Matrix *gate, *up;
  const bf16* const* x;
  bf16* const* out;
  int64_t rows;
};

// An FP8 latent in its slot: `rank` bytes of E4M3, an fp32 scale for each kLatentGroup of them (a power of two from
// 2^kLatentLeast on, or NaN), and the rope key in bf16.
constexpr int64_t kLatentGroup = 128;
constexpr int kLatentLeast = -117;  // so that E4M3's least number is a normal bf16 number with it
struct LatentRecord {
  int64_t rank, rope;
  int64_t scale(int64_t group) const { return rank + group * 4; }
  int64_t key() const { return scale((rank + kLatentGroup - 1) / kLatentGroup); }
  int64_t bytes() const { return key() + rope * 2; }
};

// Absorbed attention of rows over chosen slots.
struct AttendArgs {
  const bf16* query;
  int64_t query_row, query_head;
  const void* latent;     // bf16, or FP8 records
  int64_t latent_stride;  // in elements of bf16, or bytes
  const int64_t* slots;
  int64_t slots_row, count;  // slots a row; negative ones are skipped
  int64_t start;             // if not negative, row r takes only its first start + r + 1 slots (causal)
  int64_t heads, latent_dim, rank;
  float scale;
  bool fp8 = false;  // latents are FP8 records
};
inline int64_t attend_count(const AttendArgs& a, int64_t row) {
  return a.start >= 0 && a.start + row + 1 < a.count ? a.start + row + 1 : a.count;
}
// Slots are attended to in chunks of this many; partial results are merged in the chunks' order.
constexpr int64_t kAttendChunk = 64;

// The indexer's scores of the rows of one sequence. Row r is position start + r and sees positions 0 .. start + r.
struct SelectArgs {
  const bf16* query;
  int64_t query_row, query_head;
  const float* weight;
  int64_t weight_row, heads, dim;
  const void* keys;     // bf16; FP8 E4M3 if there are scales
  int64_t keys_stride;  // in elements
  const float* scales;  // null, or one for each slot: multiplies the scores of its key
  const int64_t* table;
  int64_t block_size, start, topk;
  bool few = false;  // at most kSelectRows rows in all: another order of sums, the same for each such number of rows
};
// The best so far of one row, in order of position. Keys sort like the scores; NaN is the largest.
struct Candidates {
  uint32_t* keys;
  int32_t* positions;
  int64_t count, capacity;
  float threshold;  // later scores count only above it
  bool open;        // fewer than topk seen: everything counts
};
constexpr int64_t kSelectRows = 16;    // rows that share one packing of the keys
constexpr int64_t kSelectSlack = 128;  // room beyond `capacity` for a whole tile

// Bytes that `score` works in: a tile of keys as bf16, the same transposed, their scales, and the queries rearranged.
struct SelectScratch {
  int64_t staged, packed, scales, queries;
  SelectScratch(int64_t tile, int64_t rows, int64_t heads, int64_t dim)
      : staged(lines(tile * dim * 2 + 64)),
        packed(lines(tile * (dim + 1) * 2)),
        scales(lines(tile * 4)),
        queries(lines(rows * ((heads + 7) / 8) * 8 * dim * 2)) {}
  int64_t bytes() const { return staged + packed + scales + queries; }
  static int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
};

struct NormArgs {
  const bf16* x;
  int64_t x_row;
  const bf16 *weight, *bias;  // bias: LayerNorm, else null
  int64_t size;
  float eps;
};
struct RopeArgs {
  const bf16* x;
  int64_t x_row, x_head, heads, size;  // size: values a head; all are copied, `dims` from `first` rotated
  int64_t first, dims;
  const float *cos, *sin;  // [rows, dims / 2]
  bool interleaved;
};
struct RouteArgs {
  const float* bias;
  int64_t experts, top_k;
  bool normalise;
  float scale;
};

struct Kernels {
  const char* name;
  int64_t lanes;        // outputs of one vector
  int64_t select_tile;  // keys of one packed tile

  void (*product)(const ProductArgs&, int64_t first, int64_t last);
  void (*gated)(const GatedArgs&, int64_t first, int64_t last);
  // The same for many rows; room: gemm_room() bytes. Sums in another order than the two above.
  void (*gemm)(const ProductArgs&, int64_t first, int64_t last, bf16* room);
  void (*gemm_gated)(const GatedArgs&, int64_t first, int64_t last, bf16* room);
  // out[h] = Σ_x weights[x] · parts[x][h] in fp32, rounded once.
  void (*combine)(bf16* out, const float* const* parts, const float* weights, int64_t count, int64_t size);
  // into += x in fp32, rounded.
  void (*accumulate)(bf16* into, const bf16* x, int64_t size);
  // part: heads maxima, heads sums, then heads × rank unnormalised outputs, fp32. scratch: attend_scratch() bytes.
  void (*attend)(const AttendArgs&, int64_t row, int64_t chunk, float* part, char* scratch);
  void (*merge)(float* into, const float* part, int64_t heads, int64_t rank);
  void (*finish)(bf16* out, int64_t out_head, const float* part, int64_t heads, int64_t rank);
  // Adds the best of positions [first, last) to `rows` ≤ kSelectRows candidates, one per row from `row`; `first` is a
  // multiple of select_tile. scratch: SelectScratch::bytes().
  void (*score)(const SelectArgs&, int64_t row, int64_t rows, int64_t first, int64_t last, Candidates*, char* scratch);
  // Leaves the topk best of the candidates, lowest position first on ties.
  void (*keep)(Candidates&, int64_t topk);
  // out ← x as FP8 E4M3 times a power of two, which is returned: 2^least at least; NaN (and zeros) unless every value is
  // finite.
  float (*quantise)(const bf16* x, int64_t size, int least, uint8_t* out);
  // out [rank + rope] ← the latent of a record; exact.
  void (*widen_latent)(const uint8_t* record, int64_t rank, int64_t rope, bf16* out);
  void (*norm)(const NormArgs&, int64_t row, bf16* out);
  void (*rope)(const RopeArgs&, int64_t row, bf16* out, int64_t out_head);
  // One row: scores before the sigmoid are overwritten by those behind it; keys has room for `experts`.
  void (*route)(const RouteArgs&, float* scores, int64_t* ids, float* weights, uint32_t* keys);
};

inline int64_t attend_part(int64_t heads, int64_t rank) { return heads * (2 + rank); }
inline int64_t attend_scratch(const AttendArgs& a) {
  return kAttendChunk * (a.heads * 6 + 32 + 8 + (a.fp8 ? a.latent_dim * 2 : 0)) + 256;
}

// Bytes of two panels in bf16 with their scales in fp32.
inline int64_t gemm_room(int64_t inner, int64_t group) {
  return inner * kPanel * 2 * 2 + (inner + group - 1) / group * kPanel * 4 * 2;
}
inline int64_t gemm_room(const Matrix& w) { return gemm_room(w.inner, w.group); }

extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16;

}  // namespace freehold
