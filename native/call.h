// What every entry point begins with.
#pragma once

#include <mutex>

#include "context.h"

namespace freehold {

constexpr int64_t kRows = 16;  // rows that share one reading of the weights

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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
