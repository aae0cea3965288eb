// Loops whose calls several threads share.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>

#include "base/isa.hpp"
#include "base/threads.hpp"

namespace ppo_fast::PPO_FAST_ISA {

// For Loop::at_a_time: a share of the calls that are left. Then a thread's calls are mostly next to
// one another, as is the memory that they read, and yet all threads end together.
constexpr std::int64_t kShare = 0;

// f(i) for i in [0, count); a thread takes `at_a_time` calls at once. A result must depend on i
// alone, not on the thread.
template <typename F>
struct Loop {
  std::int64_t count;
  std::int64_t at_a_time;
  F f;
};

template <typename F>
Loop(std::int64_t, std::int64_t, F) -> Loop<F>;

// Runs loops one after another: a loop begins when all calls of the loop before it have ended.
template <typename... F>
class Loops final : public Job {
 public:
  explicit Loops(int threads, Loop<F>... loops)
      : threads_(threads), loops_(std::move(loops)...), progress_{{{loops.count}...}} {}

  void work() override { work(std::index_sequence_for<F...>{}); }
  void wait() override { wait_for(sizeof...(F) - 1); }

 private:
  struct alignas(64) Progress {
    std::int64_t count;
    std::atomic<std::int64_t> begun{0};
    std::atomic<std::int64_t> ended{0};
  };

  template <std::size_t... I>
  void work(std::index_sequence<I...>) {
    (share<I>(), ...);
  }

  template <std::size_t I>
  void share() {
    if constexpr (I > 0) wait_for(I - 1);
    auto& [count, at_a_time, f] = std::get<I>(loops_);
    auto& [_, begun, ended] = progress_[I];
    for (std::int64_t first = begun; first < count; first = begun) {
      const std::int64_t share = std::max<std::int64_t>((count - first) / (2 * threads_), 1);
      const std::int64_t last = std::min(first + (at_a_time == kShare ? share : at_a_time), count);
      if (!begun.compare_exchange_strong(first, last)) continue;
      for (std::int64_t i = first; i < last; ++i) f(i);
      if (ended.fetch_add(last - first) + last - first == count) waiting_.wake();
    }
  }

  void wait_for(std::size_t i) {
    waiting_.until([&] { return progress_[i].ended == progress_[i].count; });
  }

  const int threads_;
  std::tuple<Loop<F>...> loops_;
  std::array<Progress, sizeof...(F)> progress_;
  Waiting waiting_;
};

// Returns how many of `num_threads` are worth waking for work of `cost` nanoseconds.
inline int useful_threads(std::int64_t cost, int num_threads) {
  constexpr std::int64_t kMinCost = 20000;  // a thread's share, above what waking it costs
  return static_cast<int>(std::clamp<std::int64_t>(cost / kMinCost, 1, num_threads));
}

template <typename... F>
void run_loops(int threads, Loop<F>... loops) {
  run(std::make_shared<Loops<F...>>(threads, std::move(loops)...), threads);
}

// Calls f(i) for i in [0, count). `cost` is the time of one call, roughly in nanoseconds.
template <typename F>
void parallel_for(std::int64_t count, std::int64_t cost, int num_threads, F f) {
  cost = std::max<std::int64_t>(cost, 1);
  const int threads = useful_threads(count * cost, num_threads);
  if (threads == 1) {
    for (std::int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  // Each thread takes further calls when it is free, since their costs may differ (masked rows).
  run_loops(threads, Loop{count, std::max<std::int64_t>(5000 / cost, 1), f});
}

}  // namespace ppo_fast::PPO_FAST_ISA
