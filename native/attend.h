// Selection, attention and cache writes, cut into parts for the threads: shared by the entry points and run_layers().
#pragma once

#include "context.h"

namespace freehold {

// Slots of the rows' best positions, -1 after the last: out[row · out_row ..]. args.few is set here.
void select(Context& c, const SelectArgs& args, int64_t* out, int64_t out_row, int64_t rows);

// The same of several spans, of which small ones are worked on side by side.
struct SelectSpan {
  SelectArgs args;
  int64_t* out;
  int64_t rows;
};
void select_spans(Context& c, const SelectSpan* spans, int64_t count, int64_t out_row);

// out [rows, heads, rank], contiguous.
void attend(Context& c, const AttendArgs& args, bf16* out, int64_t rows);

// cache[slots[r]] = the row's normed values and then the others, `dims` of them from `first` rotated.
struct WriteArgs {
  void* cache;  // bf16; FP8 E4M3 if there are scales
  int64_t cache_row;
  float* scales;  // null, or one for each slot
  const int64_t* slots;
  int64_t rows, size, first, dims;
  const float *cos, *sin;
  bool interleaved;
};
void write_rows(Context& c, const NormArgs& norm, const WriteArgs& args);

}  // namespace freehold
