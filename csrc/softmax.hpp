// What every softmax over the vocabulary shares: a row is read once, a chunk at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "dtype.hpp"
#include "math.hpp"

namespace ppo_fast::PPO_FAST_ISA {

// Independent accumulators of a sum. Their number and the order of their additions are fixed, so
// that a row's bits depend on the row alone, whatever the width of the machine's vectors.
constexpr std::int64_t kLanes = 32;
// Numbers that stay in the first-level cache between two sweeps over them.
constexpr std::int64_t kChunk = 1024;

// Room for a chunk of Real numbers.
template <typename Real>
struct alignas(64) Chunk {
  Real numbers[kChunk];
};

PPO_FAST_INLINE std::int64_t round_up(std::int64_t count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

// `count` <= kChunk numbers at x, converted and followed by -inf up to a multiple of kLanes: x
// itself where nothing needs doing, else `room`.
template <typename T>
const Compute<T>* load_chunk(const T* x, std::int64_t count, Chunk<Compute<T>>* room) {
  using Real = Compute<T>;
  if constexpr (sizeof(T) == sizeof(Real)) {
    if (count % kLanes == 0) return x;
  }
  for (std::int64_t j = 0; j < count; ++j) room->numbers[j] = widen(x[j]);
  for (std::int64_t j = count; j < round_up(count); ++j) {
    room->numbers[j] = -std::numeric_limits<Real>::infinity();
  }
  return room->numbers;
}

// Below it exp is 0, and so is what it weights (where a product would be 0 * -inf).
template <typename Real>
constexpr Real kLowest = static_cast<Real>(sizeof(Real) == 4 ? kExpLowest : -745.2);

// Running statistics of softmax(x / t) over a row: the maximum m of x, and with d = (x - m) / t
//
//   sum = sum_j exp(d_j)        weighted = sum_j exp(d_j) d_j
//
// so that log p_j = d_j - log(sum) and the entropy is H = log(sum) - weighted / sum. Milakov and
// Gimelshein 2018 (arXiv 1805.02867), algorithm 3, a chunk at a time. A row with NaN, +inf or
// nothing but -inf ends with sum or m such that log p is NaN.
template <typename Real>
struct SoftmaxSums {
  Real max = -std::numeric_limits<Real>::infinity();
  double sum = 0.0;
  double weighted = 0.0;

  // `count`, a multiple of kLanes and at most kChunk, more numbers.
  template <bool kWeighted>
  void fold(const Real* x, std::int64_t count, Real inverse_temperature) {
    rise_to(largest(x, count), inverse_temperature);
    // While nothing but -inf was seen, any finite number will do: exp(-inf - 0) is 0.
    const Real shift = max == -std::numeric_limits<Real>::infinity() ? Real(0) : max;
    Real sums[kLanes] = {}, weighteds[kLanes] = {};
    for (std::int64_t j = 0; j < count; j += kLanes) {
      for (std::int64_t k = 0; k < kLanes; ++k) {
        const Real d = (x[j + k] - shift) * inverse_temperature;
        const Real e = exp_nonpositive(d);
        sums[k] += e;
        if (kWeighted) weighteds[k] = madd(e, d < kLowest<Real> ? Real(0) : d, weighteds[k]);
      }
    }
    double chunk_sum = 0.0, chunk_weighted = 0.0;
    for (std::int64_t k = 0; k < kLanes; ++k) {
      chunk_sum += sums[k];
      chunk_weighted += weighteds[k];
    }
    sum += chunk_sum;
    weighted += chunk_weighted;
  }

  double log_sum() const { return std::log(sum); }
  double entropy() const { return log_sum() - weighted / sum; }

 private:
  static Real largest(const Real* x, std::int64_t count) {
    Real tops[kLanes];
    for (std::int64_t k = 0; k < kLanes; ++k) tops[k] = x[k];
    for (std::int64_t j = kLanes; j < count; j += kLanes) {
      for (std::int64_t k = 0; k < kLanes; ++k) tops[k] = tops[k] < x[j + k] ? x[j + k] : tops[k];
    }
    Real top = -std::numeric_limits<Real>::infinity();
    for (std::int64_t k = 0; k < kLanes; ++k) top = top < tops[k] ? tops[k] : top;
    return top;
  }

  void rise_to(Real top, Real inverse_temperature) {
    if (!(top > max)) return;
    if (max != -std::numeric_limits<Real>::infinity()) {
      const double fall = (static_cast<double>(max) - top) * inverse_temperature;
      const double factor = std::exp(fall);
      weighted = factor == 0.0 ? 0.0 : factor * (weighted + fall * sum);
      sum *= factor;
    }
    max = top;
  }
};

}  // namespace ppo_fast::PPO_FAST_ISA
