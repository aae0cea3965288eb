// The (clipped) squared or Huber error of the value model.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "base/dtype.hpp"
#include "base/parallel.hpp"
#include "base/reduce.hpp"

namespace ppo_fast {

// B sequences of T tokens; Real is float or double, by `dtype`. Matrices are [B, T], contiguous.
struct ValueLossArgs {
  Dtype dtype;
  const void* values;        // Real
  const void* old_values;    // Real; with an infinite clip any numbers will do
  const void* returns;       // Real
  const std::uint8_t* mask;  // 1: the token counts
  double clip;               // infinity: none
  double huber;              // infinity: the squared error
  double normalizer;         // 0: the tokens of this call, at least 1
  void* loss;                // out, Real [1]
  float* stats;              // out, float [ValueStats::size]
  void* grad_values;         // out, Real, dL/dvalues; or null: not wanted
  std::int64_t num_rows;
  std::int64_t num_steps;
};

namespace PPO_FAST_ISA {

// Sums, then a minimum and a maximum, of the valid tokens of a row or of more.
struct ValueStats {
  // In the order of VALUE_STATS in ppo_fast/ops/stats.py.
  enum {
    tokens,
    value_loss,
    clipped,
    values,
    returns,
    returns_squared,
    residual,
    residual_squared,
    value_min,
    value_max,
    size
  };
  double at[size] = {};

  ValueStats() {
    at[value_min] = std::numeric_limits<double>::infinity();
    at[value_max] = -std::numeric_limits<double>::infinity();
  }
  void merge(const ValueStats& other) {
    for (int i = 0; i < value_min; ++i) at[i] += other.at[i];
    at[value_min] = smaller(other.at[value_min], at[value_min]);
    at[value_max] = larger(other.at[value_max], at[value_max]);
  }
};

// The contributions of a block's tokens, 0 at masked tokens.
template <typename Real>
struct ValueBlock {
  Real valid[kTokenBlock];  // 1, or 0 where the token is masked
  Real value[kTokenBlock], old[kTokenBlock], target[kTokenBlock], target_squared[kTokenBlock];
  Real squared[kTokenBlock], worst[kTokenBlock], slope[kTokenBlock];
};

// Twice the error term of v - R: its square, or beyond `huber` a line.
template <bool kHuber, typename Real>
PPO_FAST_INLINE Real twice_error(Real error, Real squared, Real huber) {
  if constexpr (!kHuber) return squared;
  const Real size = error < Real(0) ? -error : error;
  return size <= huber ? squared : huber * (Real(2) * size - huber);
}

template <bool kHuber, typename Real>
PPO_FAST_INLINE Real error_slope(Real error, Real huber) {
  if constexpr (!kHuber) return error;
  const Real raised = error < -huber ? -huber : error;
  return raised > huber ? huber : raised;
}

// Fills the block and returns how many of its tokens are clipped.
template <bool kHuber, typename Real>
std::int32_t value_terms(const ValueLossArgs& args, std::int64_t first, std::int64_t count,
                         ValueBlock<Real>* block) {
  const auto* values = static_cast<const Real*>(args.values) + first;
  const auto* old_values = static_cast<const Real*>(args.old_values) + first;
  const auto* returns = static_cast<const Real*>(args.returns) + first;
  const std::uint8_t* mask = args.mask + first;
  const Real clip = static_cast<Real>(args.clip), huber = static_cast<Real>(args.huber);
  for (std::int64_t j = 0; j < count; ++j) block->valid[j] = static_cast<Real>(mask[j]);
  for (std::int64_t j = 0; j < count; ++j) {
    block->value[j] = masked(values[j], block->valid[j]);
    block->old[j] = masked(old_values[j], block->valid[j]);
    block->target[j] = masked(returns[j], block->valid[j]);
  }
  std::int32_t num_clipped = 0;
  for (std::int64_t j = 0; j < count; ++j) {
    const Real v = block->value[j], old = block->old[j], target = block->target[j];
    // Not old + clamp(v - old): within the range this is v to the bit, so that rounding alone never
    // makes the clipped error the larger one.
    const Real floor = old - clip, ceiling = old + clip;
    const Real raised = v < floor ? floor : v;
    const Real clipped_error = (raised > ceiling ? ceiling : raised) - target;
    const Real error = v - target;
    const Real squared = error * error;
    const Real own = twice_error<kHuber>(error, squared, huber);
    const Real near = twice_error<kHuber>(clipped_error, clipped_error * clipped_error, huber);
    const bool clipped = near > own;
    block->target_squared[j] = target * target;
    block->squared[j] = squared;
    block->worst[j] = clipped ? near : own;
    block->slope[j] = clipped ? Real(0) : error_slope<kHuber>(error, huber);
    num_clipped += clipped;
  }
  return num_clipped;
}

// Computes statistics and gradient of row i; `weight` is the weight of a token in the loss.
template <typename Real>
ValueStats value_row(const ValueLossArgs& args, std::int64_t i, RowLength length, double weight) {
  ValueStats stats;
  Extrema<Real> values;
  ValueBlock<Real> block;
  auto* grad = static_cast<Real*>(args.grad_values);
  const std::int64_t row = i * args.num_steps;
  for_blocks(length.end, [&](std::int64_t start, std::int64_t count) {
    auto* terms = std::isinf(args.huber) ? value_terms<false, Real> : value_terms<true, Real>;
    stats.at[ValueStats::clipped] += terms(args, row + start, count, &block);
    stats.at[ValueStats::value_loss] += 0.5 * sum(block.worst, count);
    stats.at[ValueStats::values] += sum(block.value, count);
    stats.at[ValueStats::returns] += sum(block.target, count);
    stats.at[ValueStats::returns_squared] += sum(block.target_squared, count);
    stats.at[ValueStats::residual_squared] += sum(block.squared, count);
    values.fold(block.value, block.valid, count);
    if (grad == nullptr) return;
    const Real scale = static_cast<Real>(weight);
    Real* to = grad + row + start;
    for (std::int64_t j = 0; j < count; ++j) {
      to[j] = masked(block.slope[j] * scale, block.valid[j]);
    }
  });
  if (grad != nullptr) {
    std::fill_n(grad + row + length.end, args.num_steps - length.end, Real(0));
  }
  stats.at[ValueStats::tokens] = static_cast<double>(length.tokens);
  stats.at[ValueStats::residual] = stats.at[ValueStats::returns] - stats.at[ValueStats::values];
  stats.at[ValueStats::value_min] = values.low;
  stats.at[ValueStats::value_max] = values.high;
  return stats;
}

// Per valid token, with v a value and R its target:
//
//   v_c  = clamp(v, old - clip, old + clip)
//   h(e) = 1/2 e^2; beyond huber: huber (|e| - huber / 2)
//   L    = sum max(h(v - R), h(v_c - R)) / normalizer
//   dL/dv = clamp(v - R, -huber, huber) / normalizer where the first error is not the smaller one,
//           else 0
//
// Source of the clipped form: the released code of Schulman et al. 2017 (OpenAI baselines, ppo2),
// and of h: Huber 1964, https://doi.org/10.1214/aoms/1177703732.
// Where the second error is the larger one, v lies outside of the range, and v_c does not move with
// it. Saved for backward: the gradient, which is multiplied with the upstream gradient. Bytes moved
// a token in float32: 13, and 4 for the gradient; for the padding that ends a row, only the mask
// and the gradient.
//
// Rows are merged in their order: the bits do not depend on num_threads.
inline void value_loss(const ValueLossArgs& args, int num_threads) {
  const auto num_rows = static_cast<std::size_t>(args.num_rows);
  std::vector<RowLength> lengths(num_rows);
  std::int64_t tokens = 0;
  for (std::size_t i = 0; i < num_rows; ++i) {
    lengths[i] = row_length(args.mask + i * args.num_steps, args.num_steps);
    tokens += lengths[i].tokens;
  }
  const auto count = static_cast<double>(std::max<std::int64_t>(tokens, 1));
  const double normalizer = args.normalizer != 0.0 ? args.normalizer : count;

  std::vector<ValueStats> rows(num_rows);
  ValueStats stats;
  with_real(args.dtype, [&](auto* type) {
    using Real = std::remove_pointer_t<decltype(type)>;
    parallel_for(args.num_rows, 3 * args.num_steps, num_threads, [&](std::int64_t i) {
      rows[i] = value_row<Real>(args, i, lengths[i], 1.0 / normalizer);
    });
    for (const ValueStats& row : rows) stats.merge(row);
    *static_cast<Real*>(args.loss) =
        static_cast<Real>(stats.at[ValueStats::value_loss] / normalizer);
  });
  for (int i = 0; i < ValueStats::size; ++i) args.stats[i] = static_cast<float>(stats.at[i]);
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
