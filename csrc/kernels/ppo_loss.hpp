// The policy objectives with their KL term and entropy bonus.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "base/dtype.hpp"
#include "base/math.hpp"
#include "base/parallel.hpp"
#include "base/reduce.hpp"
#include "kernels/kl_estimate.hpp"

namespace ppo_fast {

// In the orders of Aggregation, Ratio and Objective in ppo_fast/ops/ppo_loss/api.py.
enum class Aggregation : int { token_mean, seq_mean_token_mean, seq_mean_token_sum, token_sum };
enum class Ratio : int { token, sequence, sequence_product };
enum class Objective : int { clip, cispo, mask };

// B sequences of T tokens; Real is float or double, by `dtype`. Matrices are [B, T], contiguous.
struct PpoLossArgs {
  Dtype dtype;
  const void* logprobs;      // Real
  const void* old_logprobs;  // Real
  const void* advantages;    // Real
  const std::uint8_t* mask;  // 1: the token counts
  const void* entropy;       // Real, or null
  const void* ref_logprobs;  // Real, or null
  const void* weights;       // Real, or null: all 1
  Ratio ratio;
  Objective objective;
  double clip_low;
  double clip_high;
  double dual_clip;  // infinity: none; of Objective::clip alone
  double kl_coef;    // above 0 only with ref_logprobs
  KlEstimator kl_estimator;
  double entropy_coef;  // other than 0 only with entropy
  Aggregation aggregation;
  double normalizer;    // 0: the tokens (or sequences) of this call, at least 1
  void* loss;           // out, Real [1]
  float* stats;         // out, float [PpoStats::size]
  void* grad_logprobs;  // out, Real, dL/dlogprobs; or null: not wanted
  void* grad_entropy;   // out, Real, dL/dentropy; or null: not wanted
  std::int64_t num_rows;
  std::int64_t num_steps;
};

namespace PPO_FAST_ISA {

// Sums, then one minimum, then maxima, of the valid tokens of a row or of more.
struct PpoStats {
  // In the order of PPO_STATS in ppo_fast/ops/stats.py.
  enum {
    tokens,
    policy_loss,
    kl_loss,
    ref_kl,
    entropy,
    approx_kl,
    approx_kl_k3,
    clipped_high,
    clipped_low,
    dual_clipped,
    ratio,
    ratio_min,
    ratio_max,
    max_log_ratio,
    size
  };
  double at[size] = {};

  PpoStats() {
    at[ratio_min] = std::numeric_limits<double>::infinity();
    at[ratio_max] = at[max_log_ratio] = -std::numeric_limits<double>::infinity();
  }
  void merge(const PpoStats& other) {
    for (int i = 0; i < ratio_min; ++i) at[i] += other.at[i];
    at[ratio_min] = smaller(other.at[ratio_min], at[ratio_min]);
    for (int i = ratio_max; i < size; ++i) at[i] = larger(other.at[i], at[i]);
  }
};

// The bounds of r and of log r, computed once.
template <typename Real>
struct PpoBounds {
  Real low, high, dual, log_low, log_high, log_dual;

  explicit PpoBounds(const PpoLossArgs& args)
      : low(static_cast<Real>(1.0 - args.clip_low)),
        high(static_cast<Real>(1.0 + args.clip_high)),
        dual(static_cast<Real>(args.dual_clip)),
        log_low(static_cast<Real>(std::log1p(-args.clip_low))),
        log_high(static_cast<Real>(std::log1p(args.clip_high))),
        log_dual(static_cast<Real>(std::log(args.dual_clip))) {}
};

// The contributions of a block's tokens, 0 at masked tokens.
template <typename Real>
struct PpoBlock {
  Real valid[kTokenBlock];  // 1, or 0 where the token is masked
  Real log_ratio[kTokenBlock], advantage[kTokenBlock], ratio[kTokenBlock], k3[kTokenBlock];
  Real policy_loss[kTokenBlock], log_ref_ratio[kTokenBlock], kl[kTokenBlock];
  Real kl_slope[kTokenBlock], entropy[kTokenBlock], slope[kTokenBlock];
};

// The log-ratios of `count` tokens from `first` on. Inputs are masked, not results: at masked
// tokens log r = 0, and nothing is inf or NaN.
template <typename Real>
void log_ratios(const PpoLossArgs& args, std::int64_t first, std::int64_t count,
                PpoBlock<Real>* block) {
  const auto* logprobs = static_cast<const Real*>(args.logprobs) + first;
  const auto* old_logprobs = static_cast<const Real*>(args.old_logprobs) + first;
  const std::uint8_t* mask = args.mask + first;
  for (std::int64_t j = 0; j < count; ++j) block->valid[j] = static_cast<Real>(mask[j]);
  for (std::int64_t j = 0; j < count; ++j) {
    block->log_ratio[j] = masked(logprobs[j] - old_logprobs[j], block->valid[j]);
  }
}

// The log-ratio of row i as a whole.
template <typename Real>
Real row_log_ratio(const PpoLossArgs& args, std::int64_t i, RowLength length,
                   PpoBlock<Real>* block) {
  double total = 0.0;
  for_blocks(length.end, [&](std::int64_t start, std::int64_t count) {
    log_ratios(args, i * args.num_steps + start, count, block);
    total += sum(block->log_ratio, count);
  });
  const auto tokens = static_cast<double>(std::max<std::int64_t>(length.tokens, 1));
  return static_cast<Real>(args.ratio == Ratio::sequence ? total / tokens : total);
}

template <typename Real>
void token_ratios(std::int64_t count, PpoBlock<Real>* block) {
  for (std::int64_t j = 0; j < count; ++j) {
    const Real log_ratio = block->log_ratio[j];
    const Exponentials<Real> exponentials = exp_and_expm1(log_ratio);
    block->ratio[j] = exponentials.exp * block->valid[j];
    block->k3[j] = exponentials.expm1 - log_ratio;
  }
}

// Puts the row's ratio in place of the tokens' own, which the metrics have seen by now.
template <typename Real>
void use_row_ratio(Real log_ratio, std::int64_t count, PpoBlock<Real>* block) {
  const Real ratio = exp(log_ratio);
  for (std::int64_t j = 0; j < count; ++j) {
    block->log_ratio[j] = masked(log_ratio, block->valid[j]);
    block->ratio[j] = masked(ratio, block->valid[j]);
  }
}

template <typename Real>
struct PolicyTerm {
  Real loss, slope;  // the slope is the derivative in the token's log-prob
};

// In the forms with two comparisons the slope of a NaN ratio is 0, as under torch.clamp, and its
// loss is NaN.
template <Objective kObjective, typename Real>
PPO_FAST_INLINE PolicyTerm<Real> policy_term(Real log_ratio, Real ratio, Real a, Real logprob,
                                             const PpoBounds<Real>& bounds) {
  if constexpr (kObjective == Objective::clip) {
    const bool gains = a >= Real(0);
    const Real log_floor = gains ? -std::numeric_limits<Real>::infinity() : bounds.log_low;
    const Real log_ceiling = gains ? bounds.log_high : bounds.log_dual;
    const Real ceiling = gains ? bounds.high : bounds.dual;
    const Real capped = log_ratio > log_ceiling ? ceiling : ratio;
    const Real loss = -a * (log_ratio < log_floor ? bounds.low : capped);
    const bool active = (log_ratio >= log_floor) & (log_ratio <= log_ceiling);
    return {loss, active ? loss : Real(0)};
  } else if constexpr (kObjective == Objective::cispo) {
    const Real capped = log_ratio > bounds.log_high ? bounds.high : ratio;
    const Real slope = -a * (log_ratio < bounds.log_low ? bounds.low : capped);
    return {slope * logprob, slope};
  } else {
    const bool outside = (log_ratio < bounds.log_low) | (log_ratio > bounds.log_high);
    const bool inside = (log_ratio >= bounds.log_low) & (log_ratio <= bounds.log_high);
    const Real loss = outside ? Real(0) : -a * ratio;
    return {loss, inside ? loss : Real(0)};
  }
}

// Calls f with the objective as a constant, so that a loop within f has no branch on it.
template <typename F>
void with_objective(Objective objective, F f) {
  using O = Objective;
  switch (objective) {
    case O::clip:
      return f(std::integral_constant<O, O::clip>());
    case O::cispo:
      return f(std::integral_constant<O, O::cispo>());
    case O::mask:
      return f(std::integral_constant<O, O::mask>());
  }
}

template <Objective kObjective, bool kWeighted, typename Real>
void policy_terms(const PpoLossArgs& args, PpoBounds<Real> bounds, std::int64_t first,
                  std::int64_t count, PpoBlock<Real>* block) {
  const auto* logprobs = static_cast<const Real*>(args.logprobs) + first;
  const auto* advantages = static_cast<const Real*>(args.advantages) + first;
  const auto* weights = kWeighted ? static_cast<const Real*>(args.weights) + first : nullptr;
  for (std::int64_t j = 0; j < count; ++j) {
    block->advantage[j] = masked(advantages[j], block->valid[j]);
  }
  for (std::int64_t j = 0; j < count; ++j) {
    const Real logprob =
        kObjective == Objective::cispo ? masked(logprobs[j], block->valid[j]) : Real(0);
    PolicyTerm<Real> term = policy_term<kObjective>(block->log_ratio[j], block->ratio[j],
                                                    block->advantage[j], logprob, bounds);
    if (kWeighted) {  // a term of weight 0 is 0 even where it is infinite
      const Real weight = masked(weights[j], block->valid[j]);
      term.loss = masked(term.loss * weight, weight);
      term.slope = masked(term.slope * weight, weight);
    }
    block->policy_loss[j] = term.loss;
    block->slope[j] = term.slope;
  }
}

template <Objective kObjective, typename Real>
void count_clipped(const PpoBlock<Real>& block, PpoBounds<Real> bounds, std::int64_t count,
                   PpoStats* stats) {
  constexpr bool kAnySign = kObjective != Objective::clip;
  std::int32_t high = 0, low = 0, dual = 0;
  for (std::int64_t j = 0; j < count; ++j) {
    const Real a = block.advantage[j], log_ratio = block.log_ratio[j];
    high += (kAnySign | (a > Real(0))) & (log_ratio > bounds.log_high);
    low += (kAnySign | (a < Real(0))) & (log_ratio < bounds.log_low);
    dual += (a < Real(0)) & (log_ratio > bounds.log_dual);
  }
  stats->at[PpoStats::clipped_high] += high;
  stats->at[PpoStats::clipped_low] += low;
  stats->at[PpoStats::dual_clipped] += dual;
}

template <typename Real>
void kl_terms(const PpoLossArgs& args, std::int64_t first, std::int64_t count,
              PpoBlock<Real>* block) {
  const auto* logprobs = static_cast<const Real*>(args.logprobs) + first;
  const auto* ref_logprobs = static_cast<const Real*>(args.ref_logprobs) + first;
  with_estimator(args.kl_estimator, [&](auto estimator) {
    for (std::int64_t j = 0; j < count; ++j) {
      const Real d = masked(logprobs[j] - ref_logprobs[j], block->valid[j]);
      const KlTerm<Real> term = kl_term<decltype(estimator)::value>(d);
      block->log_ref_ratio[j] = d;
      block->kl[j] = term.value;
      block->kl_slope[j] = term.slope;
    }
  });
  if (args.kl_coef == 0.0) return;  // a metric only, which may be inf
  const Real coef = static_cast<Real>(args.kl_coef);
  for (std::int64_t j = 0; j < count; ++j) block->slope[j] += coef * block->kl_slope[j];
}

// Writes the gradients of log-probs and entropies, of which `weight` is a factor.
template <typename Real>
void write_gradients(const PpoLossArgs& args, std::int64_t first, std::int64_t count, double weight,
                     const PpoBlock<Real>& block) {
  if (args.grad_logprobs != nullptr) {
    auto* grad = static_cast<Real*>(args.grad_logprobs) + first;
    const Real scale = static_cast<Real>(weight);
    for (std::int64_t j = 0; j < count; ++j) {
      grad[j] = masked(block.slope[j] * scale, block.valid[j]);
    }
  }
  if (args.grad_entropy != nullptr) {
    auto* grad = static_cast<Real*>(args.grad_entropy) + first;
    const Real bonus = static_cast<Real>(-args.entropy_coef * weight);
    for (std::int64_t j = 0; j < count; ++j) grad[j] = masked(bonus, block.valid[j]);
  }
}

// Writes gradients of 0 for the padding that ends a row.
template <typename Real>
void clear_gradients(const PpoLossArgs& args, std::int64_t first, std::int64_t count) {
  for (void* grad : {args.grad_logprobs, args.grad_entropy}) {
    if (grad != nullptr) std::fill_n(static_cast<Real*>(grad) + first, count, Real(0));
  }
}

// Computes statistics and gradients of row i; `weight` is the weight of its tokens in the loss.
template <typename Real>
PpoStats ppo_row(const PpoLossArgs& args, const PpoBounds<Real>& bounds, std::int64_t i,
                 RowLength length, double weight) {
  PpoStats stats;
  Extrema<Real> extrema;  // of log r
  PpoBlock<Real> block;
  const bool by_row = args.ratio != Ratio::token;
  const Real log_ratio_of_row = by_row ? row_log_ratio(args, i, length, &block) : Real(0);
  for_blocks(length.end, [&](std::int64_t start, std::int64_t count) {
    const std::int64_t first = i * args.num_steps + start;
    log_ratios(args, first, count, &block);
    token_ratios(count, &block);
    stats.at[PpoStats::approx_kl] -= sum(block.log_ratio, count);
    stats.at[PpoStats::approx_kl_k3] += sum(block.k3, count);
    stats.at[PpoStats::ratio] += sum(block.ratio, count);
    extrema.fold(block.log_ratio, block.valid, count);
    if (by_row) use_row_ratio(log_ratio_of_row, count, &block);
    with_objective(args.objective, [&](auto objective) {
      constexpr Objective kObjective = decltype(objective)::value;
      if (args.weights == nullptr) {
        policy_terms<kObjective, false>(args, bounds, first, count, &block);
      } else {
        policy_terms<kObjective, true>(args, bounds, first, count, &block);
      }
      count_clipped<kObjective>(block, bounds, count, &stats);
    });
    stats.at[PpoStats::policy_loss] += sum(block.policy_loss, count);
    if (args.ref_logprobs != nullptr) {
      kl_terms(args, first, count, &block);
      stats.at[PpoStats::kl_loss] += sum(block.kl, count);
      stats.at[PpoStats::ref_kl] += sum(block.log_ref_ratio, count);
    }
    if (args.entropy != nullptr) {
      const auto* entropy = static_cast<const Real*>(args.entropy) + first;
      for (std::int64_t j = 0; j < count; ++j) {
        block.entropy[j] = masked(entropy[j], block.valid[j]);
      }
      stats.at[PpoStats::entropy] += sum(block.entropy, count);
    }
    write_gradients(args, first, count, weight, block);
  });
  clear_gradients<Real>(args, i * args.num_steps + length.end, args.num_steps - length.end);
  stats.at[PpoStats::tokens] = static_cast<double>(length.tokens);
  if (length.tokens > 0) {
    stats.at[PpoStats::ratio_min] = exp(extrema.low);
    stats.at[PpoStats::ratio_max] = exp(extrema.high);
    stats.at[PpoStats::max_log_ratio] = larger(-extrema.low, extrema.high);
  }
  return stats;
}

// Per valid token, with log r = logprobs - old_logprobs, A the advantage, d = logprobs - ref:
//
//   clip   policy = -A min(r, 1 + high)                 A >= 0, Schulman et al. 2017, eq. 7
//          policy = -A max(r, 1 - low)                  A < 0
//          policy = -A min(max(r, 1 - low), dual_clip)  A < 0, dual clip, Ye et al. 2020, eq. 5
//   cispo  policy = -A constant(clamp(r, 1 - low, 1 + high)) logprobs       MiniMax-M1, eq. 4-5
//   mask   policy = -A r where 1 - low <= r <= 1 + high, else 0
//   L = sum_t w_t (weight policy + kl_coef KL(d) - entropy_coef H)
//   dL/dlogprobs = w_t (weight slope + kl_coef KL'(d))      dL/dH = -entropy_coef w_t
//
// (https://arxiv.org/abs/1707.06347, https://arxiv.org/abs/1912.09729,
// https://arxiv.org/abs/2506.13585), with w_t one over the normalizer, and over the row's tokens
// too where the loss is a mean of token means. The slope of a policy term is -A r, or 0 where r is
// clipped; -A clamp(r, 1 - low, 1 + high) in cispo. Clipping is decided on log r. With a row's
// ratio log r is the mean of its tokens', or their sum, and the slopes stay these (GSPO-token,
// Zheng et al. 2025, eq. 14-17, https://arxiv.org/abs/2507.18071). Saved for backward: the two
// gradients, which one multiplication with the upstream gradient turns into those of the inputs.
// Bytes moved a token in float32: 13, and 4 each for entropy, weights, ref_logprobs and the
// gradients wanted; for the padding that ends a row, only the mask and the gradients.
//
// Rows are merged in their order: the bits do not depend on num_threads.
inline void ppo_loss(const PpoLossArgs& args, int num_threads) {
  const bool mean_of_means = args.aggregation == Aggregation::seq_mean_token_mean;
  const auto num_rows = static_cast<std::size_t>(args.num_rows);
  std::vector<RowLength> lengths(num_rows);
  std::int64_t tokens = 0, sequences = 0;
  for (std::size_t i = 0; i < num_rows; ++i) {
    lengths[i] = row_length(args.mask + i * args.num_steps, args.num_steps);
    tokens += lengths[i].tokens;
    sequences += lengths[i].tokens > 0;
  }
  const auto count = static_cast<double>(mean_of_means ? sequences : tokens);
  const double normalizer = args.normalizer != 0.0 ? args.normalizer : std::max(count, 1.0);
  // The weight of a row's sum in the loss, without the normalizer.
  const auto row_weight = [&](std::size_t i) {
    return mean_of_means ? 1.0 / std::max<std::int64_t>(lengths[i].tokens, 1) : 1.0;
  };

  std::vector<PpoStats> rows(num_rows);
  with_real(args.dtype, [&](auto* type) {
    using Real = std::remove_pointer_t<decltype(type)>;
    const PpoBounds<Real> bounds(args);
    parallel_for(args.num_rows, 8 * args.num_steps, num_threads, [&](std::int64_t i) {
      rows[i] = ppo_row(args, bounds, i, lengths[i], row_weight(i) / normalizer);
    });
    double loss = 0.0;
    for (std::size_t i = 0; i < num_rows; ++i) {
      double row_loss = rows[i].at[PpoStats::policy_loss];
      if (args.kl_coef != 0.0) row_loss += args.kl_coef * rows[i].at[PpoStats::kl_loss];
      if (args.entropy_coef != 0.0) row_loss -= args.entropy_coef * rows[i].at[PpoStats::entropy];
      loss += row_weight(i) * row_loss;
    }
    *static_cast<Real*>(args.loss) = static_cast<Real>(loss / normalizer);
  });
  PpoStats stats;
  for (const PpoStats& row : rows) stats.merge(row);
  for (int i = 0; i < PpoStats::size; ++i) args.stats[i] = static_cast<float>(stats.at[i]);
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
