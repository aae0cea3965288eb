// Sums and extrema of a row's valid tokens, which every loss over [B, T] needs.
//
// A row is taken a block at a time: loops over its tokens write what each contributes into buffers
// that stay in the first-level cache, then each buffer is summed. Separate loops become vector
// instructions; in a single loop a dozen accumulators would not fit the registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/isa.hpp"

namespace ppo_fast::PPO_FAST_ISA {

constexpr std::int64_t kTokenBlock = 512;

// Calls f(first, count) for the blocks of `count` tokens, in order.
template <typename F>
PPO_FAST_INLINE void for_blocks(std::int64_t num_tokens, F f) {
  for (std::int64_t first = 0; first < num_tokens; first += kTokenBlock) {
    f(first, std::min(kTokenBlock, num_tokens - first));
  }
}

// The number of valid tokens of a row, and where they end: the rest is padding, and is not read.
struct RowLength {
  std::int64_t tokens = 0;
  std::int64_t end = 0;
};

inline RowLength row_length(const std::uint8_t* mask, std::int64_t num_steps) {
  RowLength length;
  std::int64_t end = num_steps;
  for (; end >= 8; end -= 8) {  // eight at once
    std::uint64_t valid;
    std::memcpy(&valid, mask + end - 8, 8);
    if (valid != 0) break;
  }
  while (end > 0 && mask[end - 1] == 0) --end;
  length.end = end;
  for_blocks(end, [&](std::int64_t first, std::int64_t count) {
    std::int32_t tokens = 0;
    for (std::int64_t j = 0; j < count; ++j) tokens += mask[first + j];
    length.tokens += tokens;
  });
  return length;
}

// Returns x where `valid` is 1, and 0 where it is 0: a product with it would be NaN at inf and NaN.
template <typename Real>
PPO_FAST_INLINE Real masked(Real x, Real valid) {
  return valid != Real(0) ? x : Real(0);
}

// Sums in double, with a fixed number of accumulators in a fixed order: the bits depend on the
// numbers alone, not on the width of the machine's vectors.
template <typename Real>
double sum(const Real* x, std::int64_t count) {
  constexpr std::int64_t kAccumulators = 8;
  double sums[kAccumulators] = {};
  std::int64_t j = 0;
  for (; j + kAccumulators <= count; j += kAccumulators) {
    for (std::int64_t k = 0; k < kAccumulators; ++k) sums[k] += static_cast<double>(x[j + k]);
  }
  for (std::int64_t k = 0; j + k < count; ++k) sums[k] += static_cast<double>(x[j + k]);
  for (std::int64_t width = kAccumulators / 2; width > 0; width /= 2) {
    for (std::int64_t k = 0; k < width; ++k) sums[k] += sums[k + width];
  }
  return sums[0];
}

// The smaller and the larger of two numbers; NaN where either is NaN, as torch.amin and amax.
template <typename Real>
PPO_FAST_INLINE Real smaller(Real x, Real y) {
  return x < y || x != x ? x : y;
}
template <typename Real>
PPO_FAST_INLINE Real larger(Real x, Real y) {
  return x > y || x != x ? x : y;
}

// The smallest and the largest of the numbers folded in so far; of none, inf and -inf.
template <typename Real>
struct Extrema {
  Real low = std::numeric_limits<Real>::infinity();
  Real high = -std::numeric_limits<Real>::infinity();

  // Folds in those of `count` numbers where `valid` is not 0.
  void fold(const Real* x, const Real* valid, std::int64_t count) {
    constexpr std::int64_t kAccumulators = 16;
    constexpr Real kInf = std::numeric_limits<Real>::infinity();
    Real lows[kAccumulators], highs[kAccumulators];
    for (std::int64_t k = 0; k < kAccumulators; ++k) lows[k] = kInf, highs[k] = -kInf;
    std::int64_t j = 0;
    for (; j + kAccumulators <= count; j += kAccumulators) {
      for (std::int64_t k = 0; k < kAccumulators; ++k) {
        const Real y = x[j + k];
        lows[k] = smaller(valid[j + k] != Real(0) ? y : kInf, lows[k]);
        highs[k] = larger(valid[j + k] != Real(0) ? y : -kInf, highs[k]);
      }
    }
    for (; j < count; ++j) {
      if (valid[j] != Real(0)) low = smaller(x[j], low), high = larger(x[j], high);
    }
    for (std::int64_t k = 0; k < kAccumulators; ++k) {
      low = smaller(lows[k], low);
      high = larger(highs[k], high);
    }
  }
};

}  // namespace ppo_fast::PPO_FAST_ISA
