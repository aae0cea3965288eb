// What every loss over [B, T] ends with: sums and extrema of a row's valid tokens.
//
// A row is taken a block at a time: one loop writes what each token contributes into buffers that
// stay in the first-level cache, then each buffer is summed. Apart, both kinds of loops become
// vector instructions; as one, a dozen accumulators would not fit the registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "isa.hpp"

namespace ppo_fast::PPO_FAST_ISA {

constexpr std::int64_t kBlock = 256;

// Calls f(first, count) for the blocks of a row of num_steps tokens, in order.
template <typename F>
PPO_FAST_INLINE void for_blocks(std::int64_t num_steps, F f) {
  for (std::int64_t first = 0; first < num_steps; first += kBlock) {
    f(first, std::min(kBlock, num_steps - first));
  }
}

// In double, in a fixed number of accumulators, added up in a fixed order: the bits depend on the
// numbers alone, whatever the width of the machine's vectors.
template <typename Real>
double sum(const Real* x, std::int64_t count) {
  constexpr std::int64_t kAccumulators = 16;
  double sums[kAccumulators] = {};
  std::int64_t j = 0;
  for (; j + kAccumulators <= count; j += kAccumulators) {
    for (std::int64_t k = 0; k < kAccumulators; ++k) sums[k] += static_cast<double>(x[j + k]);
  }
  for (std::int64_t k = 0; j + k < count; ++k) sums[k] += static_cast<double>(x[j + k]);
  double total = 0.0;
  for (std::int64_t k = 0; k < kAccumulators; ++k) total += sums[k];
  return total;
}

inline std::int64_t count_true(const std::uint8_t* mask, std::int64_t count) {
  std::int64_t total = 0;
  for (std::int64_t j = 0; j < count; ++j) total += mask[j];
  return total;
}

// The smaller and the larger of two numbers; NaN where either is one, as torch.amin and amax.
template <typename Real>
PPO_FAST_INLINE Real smaller(Real x, Real y) {
  return x < y || x != x ? x : y;
}
template <typename Real>
PPO_FAST_INLINE Real larger(Real x, Real y) {
  return x > y || x != x ? x : y;
}

// Of nothing: inf and -inf.
template <typename Real>
struct Extrema {
  Real low = std::numeric_limits<Real>::infinity();
  Real high = -std::numeric_limits<Real>::infinity();

  // Of these too, where mask says that they count.
  void fold(const Real* x, const std::uint8_t* mask, std::int64_t count) {
    constexpr std::int64_t kAccumulators = 16;
    constexpr Real kInf = std::numeric_limits<Real>::infinity();
    Real lows[kAccumulators], highs[kAccumulators];
    for (std::int64_t k = 0; k < kAccumulators; ++k) lows[k] = kInf, highs[k] = -kInf;
    std::int64_t j = 0;
    for (; j + kAccumulators <= count; j += kAccumulators) {
      for (std::int64_t k = 0; k < kAccumulators; ++k) {
        const Real y = x[j + k];
        lows[k] = smaller(mask[j + k] ? y : kInf, lows[k]);
        highs[k] = larger(mask[j + k] ? y : -kInf, highs[k]);
      }
    }
    for (; j < count; ++j) {
      if (mask[j]) low = smaller(x[j], low), high = larger(x[j], high);
    }
    for (std::int64_t k = 0; k < kAccumulators; ++k) {
      low = smaller(lows[k], low);
      high = larger(highs[k], high);
    }
  }
};

}  // namespace ppo_fast::PPO_FAST_ISA
