// What a layer computes for one row between its products: norms, rotations, attention, activations.
#pragma once

#include <cmath>
#include <cstdint>

#include "base/dot.hpp"
#include "base/dtype.hpp"
#include "base/math.hpp"
#include "kernels/few_row_linear.hpp"

namespace ppo_fast::PPO_FAST_ISA {

// Reduces x with f, from `start` on, in a fixed order.
template <typename Real, typename F>
PPO_FAST_INLINE Real reduce(const Real* x, std::int64_t count, Real start, F f) {
  constexpr int kWidth = 16;
  Real parts[kWidth];
  for (int l = 0; l < kWidth; ++l) parts[l] = start;
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    for (int l = 0; l < kWidth; ++l) parts[l] = f(parts[l], x[i + l]);
  }
  for (; i < count; ++i) parts[0] = f(parts[0], x[i]);
  for (int l = 1; l < kWidth; ++l) parts[0] = f(parts[0], parts[l]);
  return parts[0];
}

// Returns the mean of x after f(sum, x) has added each number to a sum.
template <typename Real, typename F>
PPO_FAST_INLINE double mean(const Real* x, std::int64_t count, F f) {
  constexpr int kWidth = 16;
  Real sums[kWidth] = {};
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    for (int l = 0; l < kWidth; ++l) sums[l] = f(sums[l], x[i + l]);
  }
  double sum = 0.0;
  for (int l = 0; l < kWidth; ++l) sum += static_cast<double>(sums[l]);
  for (; i < count; ++i) sum += static_cast<double>(f(Real(0), x[i]));
  return sum / static_cast<double>(count);
}

// Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4: x / sqrt(mean(x^2) + eps) * weight, as
// activations for weights of type W.
template <typename W, typename Real = Compute<W>>
void rms_norm(const Real* x, const Real* weight, std::int64_t count, double eps, Operand<W>* out) {
  const double square = mean(x, count, [](Real sum, Real a) { return madd(a, a, sum); });
  const Real scale = static_cast<Real>(1.0 / std::sqrt(square + eps));
  for (std::int64_t i = 0; i < count; ++i) out[i] = Dot<W>::operand(weight[i] * (x[i] * scale));
}

// Ba et al. 2016 (arXiv 1607.06450): (x - mean) / sqrt(variance + eps) * weight + bias.
template <typename W, typename Real = Compute<W>>
void layer_norm(const Real* x, const Real* weight, const Real* bias, std::int64_t count, double eps,
                Operand<W>* out) {
  const Real middle =
      static_cast<Real>(mean(x, count, [](Real sum, Real a) { return sum + a; }));
  const double variance = mean(x, count, [middle](Real sum, Real a) {
    return madd(a - middle, a - middle, sum);
  });
  const Real scale = static_cast<Real>(1.0 / std::sqrt(variance + eps));
  for (std::int64_t i = 0; i < count; ++i) {
    const Real shift = bias == nullptr ? Real(0) : bias[i];
    out[i] = Dot<W>::operand(madd(weight[i], (x[i] - middle) * scale, shift));
  }
}

// Su et al. 2021 (arXiv 2104.09864), in the form that rotates entry i with entry i + S / 2.
template <typename Real>
void rotate(Real* x, const Real* cos, const Real* sin, std::int64_t size) {
  const std::int64_t half = size / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const Real low = x[i], high = x[i + half];
    x[i] = low * cos[i] - high * sin[i];
    x[i + half] = high * cos[i + half] + low * sin[i + half];
  }
}

// A bfloat16 number of a cache. A weight's is multiplied with rounded floats, this one with floats
// as they are.
struct CachedBFloat16 : BFloat16 {};

// One head: out [S] = softmax(scores) v over `count` tokens, `stride` apart; scores [count] are the
// scaled q . k, and are overwritten.
template <typename Real, typename Cached>
void attend(Real* scores, const Cached* values, std::int64_t stride, std::int64_t count,
            std::int64_t size, Real* out) {
  const Real max = reduce(scores, count, scores[0], [](Real a, Real b) { return a < b ? b : a; });
  for (std::int64_t j = 0; j < count; ++j) scores[j] = exp(scores[j] - max);
  const Real share = Real(1) / reduce(scores, count, Real(0), [](Real a, Real b) { return a + b; });
  for (std::int64_t i = 0; i < size; ++i) out[i] = Real(0);
  std::int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const Cached *v0 = values + j * stride, *v1 = v0 + stride, *v2 = v1 + stride, *v3 = v2 + stride;
    const Real p0 = scores[j], p1 = scores[j + 1], p2 = scores[j + 2], p3 = scores[j + 3];
    for (std::int64_t i = 0; i < size; ++i) {
      const Real first = madd(p1, widen(v1[i]), madd(p0, widen(v0[i]), out[i]));
      out[i] = madd(p3, widen(v3[i]), madd(p2, widen(v2[i]), first));
    }
  }
  for (; j < count; ++j) {
    for (std::int64_t i = 0; i < size; ++i)
      out[i] = madd(scores[j], widen(values[j * stride + i]), out[i]);
  }
  for (std::int64_t i = 0; i < size; ++i) out[i] *= share;
}

template <typename Real>
PPO_FAST_INLINE Real silu(Real x) {
  return x / (Real(1) + exp(-x));
}

// Hendrycks and Gimpel 2016 (arXiv 1606.08415): the approximation of GELU by tanh.
template <typename Real>
PPO_FAST_INLINE Real gelu_tanh(Real x) {
  constexpr Real kRoot = Real(0.7978845608028654);  // sqrt(2 / pi)
  return Real(0.5) * x * (Real(1) + tanh(kRoot * madd(Real(0.044715) * x * x, x, x)));
}

}  // namespace ppo_fast::PPO_FAST_ISA
