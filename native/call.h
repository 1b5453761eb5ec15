// What every entry point begins with.
#pragma once

#include <mutex>

#include "context.h"

namespace freehold {

constexpr int64_t kRows = 16;  // rows that share one reading of the weights

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Units of work for many rows: blocks of rows × tiles of outputs. Calls fn(first row, rows, first output, last output,
// worker); a block is what one packed tile of weights serves while it is in the cache.
constexpr int64_t kRowBlock = 256;
template <class Fn>
void each_tile(Context& c, int64_t rows, int64_t outputs, int64_t tile, Fn fn) {
  const int64_t tiles = (outputs + tile - 1) / tile, blocks = (rows + kRowBlock - 1) / kRowBlock;
  c.pool.each(blocks * tiles, [&](int64_t unit, int worker) {
    const int64_t row = unit / tiles * kRowBlock, first = unit % tiles * tile;
    fn(row, smaller(kRowBlock, rows - row), first, smaller(first + tile, outputs), worker);
  });
}

// Runs a call under the context's lock; exceptions must not reach C.
template <class Fn>
int call(void* context, Fn fn) {
  auto& c = *static_cast<Context*>(context);
  try {
    std::lock_guard<std::mutex> lock(c.mutex);
    fn(c);
    return 0;
  } catch (...) {
    return 1;
  }
}

}  // namespace freehold
