// Rows over threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.hpp"

namespace ppo_fast::PPO_FAST_ISA {

// Calls f(i) for i in [0, count). `cost` is what one call takes, in steps of about a nanosecond:
// it decides how many of `num_threads` are worth waking. A result must depend on i alone, and so
// not on the thread.
template <typename F>
void parallel_for(std::int64_t count, std::int64_t cost, int num_threads, F f) {
  constexpr std::int64_t kMinCost = 20000;  // a thread's share, above what waking it costs
  cost = std::max<std::int64_t>(cost, 1);
  const std::int64_t useful = std::clamp<std::int64_t>(count * cost / kMinCost, 1, num_threads);
  [[maybe_unused]] const int threads = static_cast<int>(useful);
  // Calls of unequal cost (masked rows) are shared out as they come.
  [[maybe_unused]] const std::int64_t at_a_time = std::max<std::int64_t>(kMinCost / cost / 4, 1);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic, at_a_time) if (threads > 1)
#endif
  for (std::int64_t i = 0; i < count; ++i) f(i);
}

}  // namespace ppo_fast::PPO_FAST_ISA
