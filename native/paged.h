// Routed experts that are in memory only while they are used: what the kernels ask of the pager, which is Python's.
//
// A use of what is in memory is counted here and costs Python nothing; only a miss, which costs a read from disk, calls.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace freehold {

// Thrown when the pager could not read, for a reason that it has kept, or did not do what it was asked for.
struct PagingFailed {};

inline bool any_missing(const Paged& paged, const int64_t* ids, int64_t count) {
  bool any = false;
  for (int64_t i = 0; i < count; ++i) any |= paged.places[ids[i]].codes == nullptr;
  return any;
}

// Returns once all these matrices of a stack, and of those that go with it, are in memory. Null: all always are.
inline void bring(const Paged* paged, const int64_t* ids, int64_t count) {
  if (paged == nullptr) return;
  for (int64_t i = 0; i < count; ++i) paged->uses[ids[i]] += 1.0f;
  if (!any_missing(*paged, ids, count)) return;
  if (paged->fetch(paged->stack, ids, count) != 0 || any_missing(*paged, ids, count)) throw PagingFailed();
}

}  // namespace freehold
