// What every entry point begins with.
#pragma once

#include <mutex>

#include "context.h"
#include "paged.h"

namespace freehold {

// Runs a call under the context's lock; exceptions must not reach C.
template <class Fn>
int call(void* context, Fn fn) {
  auto& c = *static_cast<Context*>(context);
  try {
    std::lock_guard<std::mutex> lock(c.mutex);
    fn(c);
    return 0;
  } catch (const PagingFailed&) {
    return 2;
  } catch (...) {
    return 1;
  }
}

}  // namespace freehold
