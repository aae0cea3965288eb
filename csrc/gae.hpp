// Generalised advantage estimation: pure C++17 over pointers, no Python, no torch.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ppo_fast {

// Arguments of gae() for B sequences of T steps. Matrices are [B, T], row-major and contiguous.
// `mask` (true: the step counts) and `dones` (true: the episode ends with the step) may be null:
// all steps count, no episode ends.
template <typename Real>
struct GaeArgs {
  const Real* rewards;
  const Real* values;
  const bool* mask;
  const bool* dones;
  const Real* bootstrap_value;  // [B], the value that follows the last valid step
  const Real* lam;              // [B]
  Real gamma;
  Real* advantages;  // out
  Real* returns;     // out
  std::int64_t num_rows;
  std::int64_t num_steps;
};

// Walks `Rows` rows together from the last step to the first. Every step of a row waits for the
// one after it (a multiplication and an addition); the chain of another row fills that wait.
// `args` is a copy: the stores cannot change it, so that it stays in registers.
template <int Rows, typename Real>
void gae_rows(GaeArgs<Real> args, std::int64_t first_row) {
  Real next_value[Rows], next_advantage[Rows], decay[Rows];
  for (int r = 0; r < Rows; ++r) {
    next_value[r] = args.bootstrap_value[first_row + r];
    next_advantage[r] = Real(0);
    decay[r] = args.gamma * args.lam[first_row + r];
  }
  for (std::int64_t t = args.num_steps - 1; t >= 0; --t) {
    for (int r = 0; r < Rows; ++r) {
      const std::int64_t i = (first_row + r) * args.num_steps + t;
      if (args.mask != nullptr && !args.mask[i]) {
        args.advantages[i] = args.returns[i] = Real(0);
        continue;
      }
      if (args.dones != nullptr && args.dones[i]) next_value[r] = next_advantage[r] = Real(0);
      const Real value = args.values[i];
      const Real delta = args.rewards[i] + args.gamma * next_value[r] - value;
      next_advantage[r] = delta + decay[r] * next_advantage[r];
      next_value[r] = value;
      args.advantages[i] = next_advantage[r];
      args.returns[i] = next_advantage[r] + value;
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
// Steps outside the mask are stepped over; nothing that stands there is read except the mask, and
// 0 is written. Bytes moved a step: 16 in float32, 32 in float64, and 1 each for mask and dones.
//
// A row's bits depend on that row alone: the order of its operations is fixed (contraction into
// fused multiply-adds is off), and neither num_threads nor the other rows change it.
template <typename Real>
void gae(const GaeArgs<Real>& args, int num_threads) {
  // Two rows together are measured best: the four arrays of more rows, a power of two apart, fall
  // into the same few cache sets and evict each other (8 rows at T = 1024: ten times slower).
  const std::int64_t num_pairs = (args.num_rows + 1) / 2;
  // A thread's share, at least: 25 us, above what it costs to wake and to wait for one.
  constexpr std::int64_t kMinSteps = 16384;
  const std::int64_t useful = args.num_rows * args.num_steps / kMinSteps;
  [[maybe_unused]] const int threads =
      static_cast<int>(std::clamp<std::int64_t>(useful, 1, num_threads));
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
  for (std::int64_t pair = 0; pair < num_pairs; ++pair) {
    const std::int64_t first = 2 * pair;
    if (first + 1 < args.num_rows) {
      gae_rows<2>(args, first);
    } else {
      gae_rows<1>(args, first);
    }
  }
}

}  // namespace ppo_fast
