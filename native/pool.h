// A pool of threads for short bursts of work.
//
// The caller works too and never waits for a thread that has not begun: chunks are claimed one at a time, so a worker
// that is asleep costs nothing but its help, and when one is descheduled inside a chunk the caller works alone for a
// while. Idle workers spin briefly, then yield, then sleep.
// What a chunk computes never depends on who runs it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace freehold {

class Pool {
 public:
  // threads ≥ 1 counts the caller; threads - 1 workers start with the first parallel run.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  using Work = void (*)(void* arg, int64_t chunk, int worker);
  // Runs work(arg, chunk, worker) for every chunk in [0, chunks) and returns when all are done; worker is in
  // [0, threads). Not reentrant, and only one thread may call it at a time.
  void run(int64_t chunks, Work work, void* arg);

  template <class Fn>
  void each(int64_t chunks, Fn fn) {
    run(chunks, [](void* arg, int64_t chunk, int worker) { (*static_cast<Fn*>(arg))(chunk, worker); }, &fn);
  }

 private:
  // Everything threads share. Replaced whole in a forked child, where the workers do not exist.
  struct State {
    // job (32 bits) | chunks (16) | next chunk (16). One word, so that a claim of a finished job cannot succeed.
    alignas(64) std::atomic<uint64_t> ticket{0};
    std::atomic<Work> work{nullptr};
    std::atomic<void*> arg{nullptr};
    alignas(64) std::atomic<int64_t> finished{0};
    alignas(64) std::atomic<int> sleepers{0};
    std::atomic<bool> caller_sleeps{false};
    std::atomic<bool> stop{false};
    std::mutex mutex;
    std::condition_variable wake, done;
    std::vector<std::thread> workers;
  };

  static void help(State& state, int worker);
  static void serve(State* state, int worker);
  void start();
  void wait_for_others(State& state, int64_t chunks);

  int threads_;
  int64_t born_;  // number of forks seen when the workers were started
  State* state_ = nullptr;
  uint64_t alone_until_ = 0;  // time stamp until which the caller asks for no help
};

}  // namespace freehold
