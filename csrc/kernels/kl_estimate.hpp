// Per-token estimates of the KL divergence between two policies.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "base/dtype.hpp"
#include "base/math.hpp"
#include "base/parallel.hpp"

namespace ppo_fast {

// In the order of ESTIMATORS in ppo_fast/ops/kl_estimate/api.py.
enum class KlEstimator : int { k1, abs, k2, k3, k1_plus_k2, k3_clamped };

// N tokens; Real is float or double, by `dtype`.
struct KlEstimateArgs {
  Dtype dtype;
  const void* logprobs;      // Real [N]
  const void* ref_logprobs;  // Real [N]
  const std::uint8_t* mask;  // [N], or null: all tokens count
  KlEstimator estimator;
  void* estimate;  // out, Real [N]
  void* slope;     // out, Real [N]: the derivative in logprobs; or null: not wanted
  std::int64_t num_tokens;
};

namespace PPO_FAST_ISA {

template <typename Real>
struct KlTerm {
  Real value;
  Real slope;
};

// An estimate from d = log pi - log ref, and its derivative in d:
//
//   k1     d                   1
//   abs    |d|                 sign(d)
//   k2     d^2 / 2             d
//   k3     exp(-d) - 1 + d     1 - exp(-d)
//   k1+k2  d                   d
//   k3 clamped: k3 of d within [-20, 20]; from 10 on it is 10, with derivative 0
//
// Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html.
template <KlEstimator kEstimator, typename Real>
PPO_FAST_INLINE KlTerm<Real> kl_term(Real d) {
  if constexpr (kEstimator == KlEstimator::k1) {
    return {d, Real(1)};
  } else if constexpr (kEstimator == KlEstimator::abs) {
    const Real sign = d > Real(0) ? Real(1) : (d < Real(0) ? Real(-1) : Real(0));
    return {d < Real(0) ? -d : d, sign};
  } else if constexpr (kEstimator == KlEstimator::k2) {
    return {Real(0.5) * d * d, d};
  } else if constexpr (kEstimator == KlEstimator::k3) {
    const Real e = expm1(-d);
    return {e + d, -e};
  } else if constexpr (kEstimator == KlEstimator::k3_clamped) {
    // k3 is above 10 from d = -2.6 down and from d = 11 up; NaN stays NaN
    d = d < Real(-20) ? Real(-20) : (d > Real(20) ? Real(20) : d);
    const Real e = expm1(-d);
    const Real value = e + d;
    return value > Real(10) ? KlTerm<Real>{Real(10), Real(0)} : KlTerm<Real>{value, -e};
  } else {
    return {d, d};
  }
}

// Calls f with the estimator as a constant, so that a loop within f has no branch on it.
template <typename F>
void with_estimator(KlEstimator estimator, F f) {
  using E = KlEstimator;
  switch (estimator) {
    case E::k1:
      return f(std::integral_constant<E, E::k1>());
    case E::abs:
      return f(std::integral_constant<E, E::abs>());
    case E::k2:
      return f(std::integral_constant<E, E::k2>());
    case E::k3:
      return f(std::integral_constant<E, E::k3>());
    case E::k1_plus_k2:
      return f(std::integral_constant<E, E::k1_plus_k2>());
    case E::k3_clamped:
      return f(std::integral_constant<E, E::k3_clamped>());
  }
}

// Computes `count` tokens from `first` on. d is masked, not the results: 0 * inf would be NaN.
template <KlEstimator kEstimator, typename Real, bool kMasked, bool kSloped>
void kl_tokens(const KlEstimateArgs& args, std::int64_t first, std::int64_t count) {
  const auto* logprobs = static_cast<const Real*>(args.logprobs) + first;
  const auto* ref_logprobs = static_cast<const Real*>(args.ref_logprobs) + first;
  const std::uint8_t* mask = kMasked ? args.mask + first : nullptr;
  auto* estimate = static_cast<Real*>(args.estimate) + first;
  auto* slope = kSloped ? static_cast<Real*>(args.slope) + first : nullptr;
  for (std::int64_t j = 0; j < count; ++j) {
    const Real difference = logprobs[j] - ref_logprobs[j];
    const KlTerm<Real> term = kl_term<kEstimator>(!kMasked || mask[j] ? difference : Real(0));
    estimate[j] = term.value;
    if (kSloped) slope[j] = term.slope;
  }
}

// Saved for backward: the slope, if it is asked for. Where the mask is true, the gradient in
// logprobs is the slope times the upstream gradient, and the gradient in ref_logprobs is its
// negative. Bytes moved a token in float32: 12, and 4 for the slope and 1 for the mask.
inline void kl_estimate(const KlEstimateArgs& args, int num_threads) {
  constexpr std::int64_t kTokens = 1024;  // at a time
  const std::int64_t num_parts = (args.num_tokens + kTokens - 1) / kTokens;
  with_real(args.dtype, [&](auto* type) {
    using Real = std::remove_pointer_t<decltype(type)>;
    with_estimator(args.estimator, [&](auto estimator) {
      constexpr KlEstimator kEstimator = decltype(estimator)::value;
      auto* tokens = args.mask == nullptr
                         ? (args.slope == nullptr ? kl_tokens<kEstimator, Real, false, false>
                                                  : kl_tokens<kEstimator, Real, false, true>)
                         : (args.slope == nullptr ? kl_tokens<kEstimator, Real, true, false>
                                                  : kl_tokens<kEstimator, Real, true, true>);
      parallel_for(num_parts, 2 * kTokens, num_threads, [&](std::int64_t i) {
        const std::int64_t first = i * kTokens;
        tokens(args, first, std::min(kTokens, args.num_tokens - first));
      });
    });
  });
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
