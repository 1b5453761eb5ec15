#include "pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

namespace freehold {
namespace {

constexpr int64_t kMostChunks = 0xffff;
// In ticks of the time stamp counter (2 to 4 a nanosecond): a few microseconds of spinning bridge two kernels of one
// call; the yielding that follows bridges the Python between two calls, and gives way to whoever else can run.
constexpr uint64_t kSpin = 15'000, kYield = 600'000;

// A wait this long, and longer than the caller's own share, means that a worker lost its processor inside a chunk.
// The machine is then busy elsewhere, and the caller goes on alone for kAlone times as long as it waited.
constexpr uint64_t kStall = 300'000, kAlone = 8;

std::atomic<int64_t> forks{0};

void count_forks() {
  static const int once = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)once;
}

// Waits until ready(), at most kSpin + kYield ticks.
template <class Ready>
bool wait_briefly(Ready ready) {
  const uint64_t begin = __rdtsc();
  for (;;) {
    if (ready()) return true;
    const uint64_t spent = __rdtsc() - begin;
    if (spent > kYield) return false;
    if (spent > kSpin) {
      sched_yield();
    } else {
      _mm_pause();
    }
  }
}

inline uint64_t next_of(uint64_t ticket) { return ticket & 0xffff; }
inline uint64_t chunks_of(uint64_t ticket) { return (ticket >> 16) & 0xffff; }
inline bool open(uint64_t ticket) { return next_of(ticket) < chunks_of(ticket); }

}  // namespace

Pool::Pool(int threads) : threads_(threads < 1 ? 1 : threads), born_(0) { count_forks(); }

Pool::~Pool() {
  if (state_ == nullptr || born_ != forks.load()) return;  // after a fork there is nobody to join
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stop.store(true);
  }
  state_->wake.notify_all();
  for (auto& worker : state_->workers) worker.join();
  delete state_;
}

void Pool::start() {
  // In a forked child the old state is abandoned: its threads are gone, and its mutex may be held for ever.
  born_ = forks.load();
  state_ = new State;
  for (int worker = 1; worker < threads_; ++worker) {
    try {
      state_->workers.emplace_back(serve, state_, worker);
    } catch (...) {
      break;  // fewer helpers; the caller does the rest
    }
  }
}

void Pool::help(State& state, int worker) {
  for (;;) {
    uint64_t ticket = state.ticket.load(std::memory_order_acquire);
    if (!open(ticket)) return;
    // Read between the ticket and its claim: if the claim succeeds the job was still open, so these are its own.
    const Work work = state.work.load(std::memory_order_relaxed);
    void* const arg = state.arg.load(std::memory_order_relaxed);
    if (!state.ticket.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
    work(arg, int64_t(next_of(ticket)), worker);
    const int64_t finished = state.finished.fetch_add(1, std::memory_order_seq_cst) + 1;
    if (worker != 0 && finished == int64_t(chunks_of(ticket)) && state.caller_sleeps.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> lock(state.mutex);
      state.done.notify_one();
    }
  }
}

void Pool::serve(State* state, int worker) {
  const auto ready = [state] { return open(state->ticket.load(std::memory_order_seq_cst)) || state->stop.load(); };
  for (;;) {
    if (!wait_briefly(ready)) {
      std::unique_lock<std::mutex> lock(state->mutex);
      state->sleepers.fetch_add(1, std::memory_order_seq_cst);
      state->wake.wait(lock, ready);
      state->sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }
    if (state->stop.load()) return;
    help(*state, worker);
  }
}

void Pool::run(int64_t chunks, Work work, void* arg) {
  const uint64_t begin = __rdtsc();
  if (threads_ == 1 || chunks < 2 || begin < alone_until_) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) work(arg, chunk, 0);
    return;
  }
  if (chunks > kMostChunks) {  // the ticket has no room for more
    for (int64_t first = 0; first < chunks; first += kMostChunks) {
      const int64_t count = chunks - first < kMostChunks ? chunks - first : kMostChunks;
      each(count, [&](int64_t chunk, int worker) { work(arg, first + chunk, worker); });
    }
    return;
  }
  if (state_ == nullptr || born_ != forks.load(std::memory_order_relaxed)) start();
  State& state = *state_;
  state.work.store(work, std::memory_order_relaxed);
  state.arg.store(arg, std::memory_order_relaxed);
  state.finished.store(0, std::memory_order_relaxed);
  const uint64_t job = (state.ticket.load(std::memory_order_relaxed) >> 32) + 1;
  state.ticket.store(job << 32 | uint64_t(chunks) << 16, std::memory_order_seq_cst);
  if (state.sleepers.load(std::memory_order_seq_cst) > 0) {
    { std::lock_guard<std::mutex> lock(state.mutex); }
    state.wake.notify_all();
  }
  help(state, 0);
  const uint64_t worked = __rdtsc() - begin;
  wait_for_others(state, chunks);
  const uint64_t waited = __rdtsc() - begin - worked;
  if (waited > kStall && waited > worked) alone_until_ = begin + worked + waited + kAlone * waited;
}

void Pool::wait_for_others(State& state, int64_t chunks) {
  const auto ready = [&] { return state.finished.load(std::memory_order_seq_cst) == chunks; };
  if (wait_briefly(ready)) return;
  std::unique_lock<std::mutex> lock(state.mutex);
  state.caller_sleeps.store(true, std::memory_order_seq_cst);
  state.done.wait(lock, ready);
  state.caller_sleeps.store(false, std::memory_order_seq_cst);
}

}  // namespace freehold
