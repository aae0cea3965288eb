// Generalised advantage estimation.
#pragma once

#include <cstdint>
#include <type_traits>

#include "base/dtype.hpp"
#include "base/parallel.hpp"

namespace ppo_fast {

// B sequences of T steps; Real is float or double, by `dtype`. Matrices are [B, T] and contiguous.
struct GaeArgs {
  Dtype dtype;
  const void* rewards;          // Real [B, T]
  const void* values;           // Real [B, T]
  const bool* mask;             // [B, T], true: the step counts; or null: all do
  const bool* dones;            // [B, T], true: the episode ends with the step; or null: nowhere
  const void* bootstrap_value;  // Real [B], the value that follows the last valid step
  const void* lam;              // Real [B]
  double gamma;
  void* advantages;  // out, Real [B, T]
  void* returns;     // out, Real [B, T]
  std::int64_t num_rows;
  std::int64_t num_steps;
};

namespace PPO_FAST_ISA {

// Walks `Rows` rows together from the last step to the first. Every step of a row waits for the
// one after it (a multiplication and an addition); the chain of another row fills that wait.
// `args` is a copy: the stores cannot change it, so that it stays in registers.
template <typename Real, int Rows>
void gae_rows(GaeArgs args, std::int64_t first_row) {
  const auto* rewards = static_cast<const Real*>(args.rewards);
  const auto* values = static_cast<const Real*>(args.values);
  auto* advantages = static_cast<Real*>(args.advantages);
  auto* returns = static_cast<Real*>(args.returns);
  const Real gamma = static_cast<Real>(args.gamma);
  Real next_value[Rows], next_advantage[Rows], decay[Rows];
  for (int r = 0; r < Rows; ++r) {
    next_value[r] = static_cast<const Real*>(args.bootstrap_value)[first_row + r];
    next_advantage[r] = Real(0);
    decay[r] = gamma * static_cast<const Real*>(args.lam)[first_row + r];
  }
  for (std::int64_t t = args.num_steps - 1; t >= 0; --t) {
    for (int r = 0; r < Rows; ++r) {
      const std::int64_t i = (first_row + r) * args.num_steps + t;
      if (args.mask != nullptr && !args.mask[i]) {
        advantages[i] = returns[i] = Real(0);
        continue;
      }
      if (args.dones != nullptr && args.dones[i]) next_value[r] = next_advantage[r] = Real(0);
      const Real value = values[i];
      const Real delta = rewards[i] + gamma * next_value[r] - value;
      next_advantage[r] = delta + decay[r] * next_advantage[r];
      next_value[r] = value;
      advantages[i] = next_advantage[r];
      returns[i] = next_advantage[r] + value;
    }
  }
}

// Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage
// Estimation" (arXiv 1506.02438), eq. 11-16, as a reverse scan. With t' the next valid step (or
// the bootstrap value after the last one, or nothing where the episode ends with t):
//
//   delta_t = r_t + gamma * V_t' - V_t        A_t = delta_t + gamma * lam * A_t'
//   returns_t = A_t + V_t
//
// Steps outside the mask are skipped: only the mask is read there, and 0 is written. Bytes moved a
// step: 16 in float32, 32 in float64, and 1 each for mask and dones.
//
// A row's bits depend on that row alone: the order of its operations is fixed (contraction into
// fused multiply-adds is off), and neither num_threads nor the other rows change it.
inline void gae(const GaeArgs& args, int num_threads) {
  // Two rows together are measured best: the four arrays of more rows, a power of two apart, fall
  // into the same few cache sets and evict each other (8 rows at T = 1024: ten times slower).
  const std::int64_t num_pairs = (args.num_rows + 1) / 2;
  with_real(args.dtype, [&](auto* type) {
    using Real = std::remove_pointer_t<decltype(type)>;
    parallel_for(num_pairs, 3 * args.num_steps, num_threads, [&](std::int64_t pair) {
      if (2 * pair + 1 < args.num_rows) {
        gae_rows<Real, 2>(args, 2 * pair);
      } else {
        gae_rows<Real, 1>(args, 2 * pair);
      }
    });
  });
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
