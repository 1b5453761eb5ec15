// Routed experts that are in memory only while they are used: what the kernels ask of the pager, which is Python's.
//
// A use of what is in memory is counted here and costs Python nothing; only a miss, which costs a read from disk, calls.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace freehold {

// Thrown when the pager could not read; it has kept the reason.
struct PagingFailed {};

// Returns once all these matrices of a stack, and of those that go with it, are in memory.
inline void bring(const Paged& paged, const int64_t* ids, int64_t count) {
  bool missing = false;
  for (int64_t i = 0; i < count; ++i) {
    paged.uses[ids[i]] += 1.0f;
    missing |= paged.places[ids[i]].codes == nullptr;
  }
  if (missing && paged.fetch(paged.stack, ids, count) != 0) throw PagingFailed();
}

}  // namespace freehold
