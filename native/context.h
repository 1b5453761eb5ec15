// What one NativeOps owns: the chosen instruction set, the threads, and scratch memory.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace freehold {

// Memory that grows and is reused; what it held is lost when it grows.
class Scratch {
 public:
  Scratch() = default;
  Scratch(Scratch&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  char* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      const int64_t rounded = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<char*>(std::aligned_alloc(64, size_t(rounded)));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

// The parts of a layer that time is counted by, in the order of fh_clock().
enum class Part {
  kNorms,
  kAttentionProject,
  kAttentionWrite,
  kAttend,
  kIndexerProject,
  kIndexerSelect,
  kRouter,
  kExperts,
  kMlp,
  kCount
};

// Seconds by part since they were last taken.
class Clock {
 public:
  void start() { last_ = now(); }
  void mark(Part part) { mark(part, part, 0.0); }
  // What passed since the last mark; `share` of it is the other part's.
  void mark(Part part, Part other, double share) {
    const auto time = now();
    const double seconds = std::chrono::duration<double>(time - last_).count();
    seconds_[int(part)] += seconds * (1.0 - share);
    seconds_[int(other)] += seconds * share;
    last_ = time;
  }
  void take(double* out) {
    for (double& seconds : seconds_) *out++ = seconds, seconds = 0;
  }

 private:
  using Time = std::chrono::steady_clock::time_point;
  static Time now() { return std::chrono::steady_clock::now(); }
  Time last_;
  double seconds_[int(Part::kCount)] = {};
};

struct Context {
  Context(int threads, const Kernels* table) : kernels(*table), pool(threads), worker_scratch(size_t(pool.threads())) {}

  const Kernels& kernels;
  Pool pool;
  std::mutex mutex;  // one call at a time
  Scratch shared, layer;
  Clock clock;
  std::vector<Scratch> worker_scratch;

  // The same number of bytes for every worker, allocated here because a worker cannot report failure.
  void prepare(int64_t bytes) {
    for (auto& scratch : worker_scratch) scratch.get(bytes);
  }
  char* scratch(int worker) { return worker_scratch[size_t(worker)].get(0); }

  // Calls fn(first, last, worker) for parts of [0, size) that begin at multiples of `step`. cost: what one unit
  // costs, in bytes of weights read or the like; little work is not worth a second thread.
  template <class Fn>
  void ranges(int64_t size, int64_t step, int64_t cost, Fn fn) {
    const int64_t total = size * cost;
    int64_t parts = total / kWorthwhile;
    if (parts > pool.threads() * 4) parts = pool.threads() * 4;
    if (parts < 2 || pool.threads() == 1) {
      if (size > 0) fn(int64_t(0), size, 0);
      return;
    }
    const int64_t steps = (size + step - 1) / step;
    if (parts > steps) parts = steps;
    pool.each(parts, [&](int64_t part, int worker) {
      const int64_t first = steps * part / parts * step, last = steps * (part + 1) / parts * step;
      if (first < size) fn(first, last < size ? last : size, worker);
    });
  }
  static constexpr int64_t kWorthwhile = 48 << 10;
};

}  // namespace freehold
