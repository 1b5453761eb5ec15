// A weight matrix as the kernels hold it: panels of 16 outputs, in bf16 or in codes with a scale for each group.
//
// Python packs it (freehold/model/packed.py) and passes its address, so the struct's layout is part of the interface.
// A panel is a run of chunks of 8 inputs; within a chunk values are ordered [input pair][output][2], so that one vector
// register holds an input pair of every output. Codes of 4 bits are ordered [output][2][input pair], one 16-bit word
// for each (output, parity) with pair j in bits 4j .. 4j + 3; the code is the value + 8. inner is a multiple of 8,
// missing outputs of the last panel are zeros. Scales are [panel][group][16], bf16 for integers and fp32 for FP8.
#pragma once

#include <cstdint>

namespace freehold {

constexpr int64_t kPanel = 16, kChunk = 8;

enum class Kind : int64_t { kBf16 = 0, kInt8 = 1, kInt4 = 2, kFp8 = 3 };

// Where one matrix of a paged stack lies; codes are null while it is not in memory.
struct Place {
  const uint8_t* codes;
  const void* scales;
};

// A stack of matrices of which only some are in memory. `paged.h` has what is done with it.
struct Paged {
  Place* places;  // of each matrix
  float* uses;    // of each matrix: rows that were sent to it, made smaller with time by whoever reads it
  int64_t stack;  // what `fetch` is told
  // Brings these matrices, and those of the stacks that go with this one, into memory, and keeps them there until it is
  // called again. Returns 0, or 1 if it could not.
  int (*fetch)(int64_t stack, const int64_t* ids, int64_t count);
  // Begins to read what is missing of these, while the layer before this stack's is computed.
  void (*ahead)(int64_t stack, const int64_t* ids, int64_t count);
};

struct Matrix {
  const uint8_t* codes;
  const void* scales;  // null for bf16
  int64_t outputs, inner, group;
  Kind kind;
  const Paged* paged = nullptr;  // of a stack: codes and scales are then those of its places

  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t groups() const { return (inner + group - 1) / group; }
  int64_t panel_bytes() const { return inner * kPanel * (kind == Kind::kBf16 ? 16 : kind == Kind::kInt4 ? 4 : 8) / 8; }
  const uint8_t* panel(int64_t p) const { return codes + p * panel_bytes(); }

  // A matrix of `outputs` that begins at panel `first` of this one: an expert or a head of a stack.
  Matrix part(int64_t first, int64_t count) const {
    const int64_t scale_bytes = kind == Kind::kFp8 ? 4 : 2;
    const char* scale = static_cast<const char*>(scales);
    return {codes + first * panel_bytes(), scale == nullptr ? nullptr : scale + first * groups() * kPanel * scale_bytes,
            count, inner, group, kind};
  }

  // Matrix e of a stack of matrices of `outputs`.
  Matrix at(int64_t e) const {
    if (paged == nullptr) return part(e * panels(), outputs);
    return {paged->places[e].codes, paged->places[e].scales, outputs, inner, group, kind};
  }
};

}  // namespace freehold
