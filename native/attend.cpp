#include "attend.h"

#include <cstring>

#include "products.h"

namespace {

using freehold::AttendArgs;
using freehold::bf16;
using freehold::Candidates;
using freehold::Context;
using freehold::SelectArgs;
using freehold::smaller;

constexpr int64_t kLeastKeys = 1024;  // fewer keys are not worth a part of their own

// Memory of one row's candidates.
struct Room {
  int64_t capacity;
  explicit Room(int64_t topk) : capacity(topk + (topk > 1024 ? topk : 1024)) {}
  int64_t bytes() const { return (capacity + freehold::kSelectSlack) * 8; }
  Candidates at(char* memory) const {
    auto* keys = reinterpret_cast<uint32_t*>(memory);
    return {keys, reinterpret_cast<int32_t*>(keys + capacity + freehold::kSelectSlack), 0, capacity, 0.0f, true};
  }
};

struct Selection {
  Context& c;
  SelectArgs args;
  int64_t* out;
  int64_t out_row, rows;

  int64_t slot(int64_t position) const {
    return args.table[position / args.block_size] * args.block_size + position % args.block_size;
  }
  int64_t score_bytes() const {
    return freehold::SelectScratch(c.kernels.select_tile, smaller(rows, freehold::kSelectRows), args.heads, args.dim)
        .bytes();
  }

  // Rows that see no more than topk positions take them all. Returns how many there are.
  int64_t take_all() const {
    int64_t row = 0;
    for (; row < rows && args.start + row + 1 <= args.topk; ++row) {
      const int64_t seen = args.start + row + 1;
      int64_t* mine = out + row * out_row;
      for (int64_t p = 0; p < seen; ++p) mine[p] = slot(p);
      for (int64_t p = seen; p < out_row; ++p) mine[p] = -1;
    }
    return row;
  }

  void write(int64_t row, const Candidates& best) const {
    int64_t* mine = out + row * out_row;
    for (int64_t k = 0; k < best.count; ++k) mine[k] = slot(best.positions[k]);
    for (int64_t k = best.count; k < out_row; ++k) mine[k] = -1;
  }

  // A tile of at most kSelectRows rows, on one thread, in tile_bytes() of memory.
  void tile(int64_t row, char* memory) const {
    const Room room(args.topk);
    const int64_t n = smaller(freehold::kSelectRows, rows - row);
    Candidates best[freehold::kSelectRows];
    for (int64_t r = 0; r < n; ++r) best[r] = room.at(memory + score_bytes() + r * room.bytes());
    c.kernels.score(args, row, n, 0, args.start + row + n, best, memory);
    for (int64_t r = 0; r < n; ++r) {
      c.kernels.keep(best[r], args.topk);
      write(row + r, best[r]);
    }
  }
  int64_t tile_bytes() const { return score_bytes() + freehold::kSelectRows * Room(args.topk).bytes(); }

  // Many rows: parts are tiles of rows, the longest first.
  void by_rows(int64_t first_row, int64_t tiles) const {
    c.prepare(tile_bytes());
    c.pool.each(tiles, [&](int64_t part, int worker) {
      tile(first_row + (tiles - 1 - part) * freehold::kSelectRows, c.scratch(worker));
    });
  }

  // Few rows: parts are ranges of keys, each with candidates of its own, which are then chosen from once more.
  void by_keys(int64_t first_row, int64_t ranges) const {
    const Room room(args.topk);
    const int64_t step = c.kernels.select_tile, keys = args.start + rows, tiles = (keys + step - 1) / step;
    const int64_t left = rows - first_row, row_tiles = (left + freehold::kSelectRows - 1) / freehold::kSelectRows;
    const Room merged(ranges * args.topk);
    c.prepare(score_bytes());
    char* memory = c.shared.get(left * (ranges * room.bytes() + int64_t(sizeof(Candidates)) * ranges) + merged.bytes());
    char* headers = memory + left * ranges * room.bytes() + merged.bytes();
    auto* best = reinterpret_cast<Candidates*>(headers);  // [range][row]
    for (int64_t i = 0; i < ranges * left; ++i) best[i] = room.at(memory + i * room.bytes());
    c.pool.each(ranges * row_tiles, [&](int64_t part, int worker) {
      const int64_t range = part / row_tiles, row = part % row_tiles * freehold::kSelectRows;
      const int64_t n = smaller(freehold::kSelectRows, left - row);
      const int64_t begin = tiles * range / ranges * step, end = tiles * (range + 1) / ranges * step;
      Candidates* mine = best + range * left + row;
      c.kernels.score(args, first_row + row, n, begin, smaller(end, args.start + first_row + row + n), mine,
                      c.scratch(worker));
      for (int64_t r = 0; r < n; ++r) c.kernels.keep(mine[r], args.topk);
    });
    for (int64_t row = 0; row < left; ++row) {
      Candidates all = ranges > 1 ? merged.at(memory + left * ranges * room.bytes()) : best[row];
      for (int64_t range = 0; ranges > 1 && range < ranges; ++range) {
        const Candidates& part = best[range * left + row];
        std::memcpy(all.keys + all.count, part.keys, size_t(part.count) * 4);
        std::memcpy(all.positions + all.count, part.positions, size_t(part.count) * 4);
        all.count += part.count;
      }
      if (ranges > 1) c.kernels.keep(all, args.topk);
      write(first_row + row, all);
    }
  }

  void run() const {
    const int64_t first_row = take_all(), left = rows - first_row;
    if (left == 0) return;
    const int64_t tiles = (left + freehold::kSelectRows - 1) / freehold::kSelectRows, threads = c.pool.threads();
    if (tiles >= 2 * threads) return by_rows(first_row, tiles);
    const int64_t keys = args.start + rows;
    const int64_t ranges = threads == 1 ? 1 : smaller(2 * threads, keys / kLeastKeys);
    by_keys(first_row, ranges < 1 ? 1 : ranges);
  }
};

}  // namespace

namespace freehold {

void select(Context& c, const SelectArgs& args, int64_t* out, int64_t out_row, int64_t rows) {
  SelectArgs chosen = args;
  chosen.few = rows <= kSelectRows;
  Selection{c, chosen, out, out_row, rows}.run();
}

void select_spans(Context& c, const SelectSpan* spans, int64_t count, int64_t out_row) {
  // A span that is more than its share of the work is cut by keys; the others are one thread's each.
  int64_t total = 0, bytes = 0;
  const auto cost = [&](int64_t i) { return spans[i].rows * (spans[i].args.start + spans[i].rows); };
  for (int64_t i = 0; i < count; ++i) total += cost(i);
  const auto large = [&](int64_t i) {
    return spans[i].rows > kSelectRows || cost(i) * 2 * c.pool.threads() > total || c.pool.threads() == 1;
  };
  const auto selection = [&](int64_t i) {
    SelectArgs args = spans[i].args;
    args.few = spans[i].rows <= kSelectRows;
    return Selection{c, args, spans[i].out, out_row, spans[i].rows};
  };
  for (int64_t i = 0; i < count; ++i) {
    if (large(i)) {
      selection(i).run();
    } else {
      const int64_t mine = selection(i).tile_bytes();
      if (mine > bytes) bytes = mine;
    }
  }
  if (bytes == 0) return;
  c.prepare(bytes);
  c.pool.each(count, [&](int64_t i, int worker) {
    if (large(i)) return;
    const Selection mine = selection(i);
    const int64_t first_row = mine.take_all();
    if (first_row < mine.rows) mine.tile(first_row, c.scratch(worker));
  });
}

void attend(Context& c, const AttendArgs& args, bf16* out, int64_t rows) {
  const int64_t heads = args.heads, rank = args.rank;
  const int64_t chunks = (args.count + freehold::kAttendChunk - 1) / freehold::kAttendChunk;
  const int64_t part = freehold::attend_part(heads, rank), scratch = freehold::attend_scratch(heads);
  const auto finish = [&](int64_t row, const float* whole) {
    c.kernels.finish(out + row * heads * rank, rank, whole, heads, rank);
  };
  const int64_t unit = freehold::kAttendChunk * heads * (args.latent_dim + rank) / 8;  // cost of a chunk
  if (rows >= 2 * c.pool.threads() || chunks == 1) {
    c.prepare(scratch + 2 * part * 4);
    c.ranges(rows, 1, unit * chunks, [&](int64_t first, int64_t last, int worker) {
      char* memory = c.scratch(worker);
      float *whole = reinterpret_cast<float*>(memory + scratch), *next = whole + part;
      for (int64_t row = first; row < last; ++row) {
        c.kernels.attend(args, row, 0, whole, memory);
        for (int64_t chunk = 1; chunk * freehold::kAttendChunk < attend_count(args, row); ++chunk) {
          c.kernels.attend(args, row, chunk, next, memory);
          c.kernels.merge(whole, next, heads, rank);
        }
        finish(row, whole);
      }
    });
    return;
  }
  c.prepare(scratch);
  float* parts = reinterpret_cast<float*>(c.shared.get(rows * chunks * part * 4));
  c.ranges(rows * chunks, 1, unit, [&](int64_t first, int64_t last, int worker) {
    for (int64_t i = first; i < last; ++i)
      c.kernels.attend(args, i / chunks, i % chunks, parts + i * part, c.scratch(worker));
  });
  for (int64_t row = 0; row < rows; ++row) {
    float* whole = parts + row * chunks * part;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) c.kernels.merge(whole, whole + chunk * part, heads, rank);
    finish(row, whole);
  }
}

void write_rows(Context& c, const NormArgs& norm, const WriteArgs& a) {
  c.prepare(a.size * 4 + 4);
  c.ranges(a.rows, 1, a.size * 8, [&](int64_t begin, int64_t end, int worker) {
    bf16* values = reinterpret_cast<bf16*>(c.scratch(worker));
    for (int64_t row = begin; row < end; ++row) {
      c.kernels.norm(norm, row, values);
      std::memcpy(values + norm.size, norm.x + row * norm.x_row + norm.size, size_t(a.size - norm.size) * 2);
      // One row at a time from its own buffer, hence the tables are moved to the row.
      const RopeArgs rope{values, 0, 0, 1, a.size, a.first, a.dims, a.cos + row * (a.dims / 2),
                          a.sin + row * (a.dims / 2), a.interleaved};
      const int64_t slot = a.slots[row], at = slot * a.cache_row;
      if (a.scales == nullptr) {
        c.kernels.rope(rope, 0, static_cast<bf16*>(a.cache) + at, 0);
      } else {
        c.kernels.rope(rope, 0, values + a.size, 0);
        a.scales[slot] = c.kernels.quantise(values + a.size, a.size, static_cast<uint8_t*>(a.cache) + at);
      }
    }
  });
}

}  // namespace freehold
