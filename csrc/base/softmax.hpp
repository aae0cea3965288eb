// What every softmax over the vocabulary shares: a row is read once, a chunk at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "base/dtype.hpp"
#include "base/math.hpp"

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

// Returns the `count` <= kChunk numbers at x, converted and padded with -inf to a multiple of
// kLanes: x itself where neither is needed, else `room`.
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

// Returns x where 2^x is not 0, else a finite number: 2^x times it is then 0, where 0 * -inf is
// NaN.
PPO_FAST_INLINE float finite_weight(float x) { return x < -127.0f ? -127.0f : x; }
PPO_FAST_INLINE double finite_weight(double x) { return x < -1100.0 ? -1100.0 : x; }

// Returns the factor of a distance from the maximum in softmax(x / t) that makes it a power of two.
template <typename Real>
PPO_FAST_INLINE Real log2_scale(double temperature) {
  return static_cast<Real>(kLog2E / temperature);
}

// Running statistics of softmax(x / t) over a row: the maximum m of x, and with
// d = (x - m) log2(e) / t, so that exp((x - m) / t) = 2^d,
//
//   sum = sum_j 2^d_j        weighted = sum_j 2^d_j d_j
//
// whence log p_j = d_j log(2) - log(sum) and the entropy H = log(sum) - log(2) weighted / sum.
// Milakov and Gimelshein 2018 (arXiv 1805.02867), algorithm 3, a chunk at a time. For a row with
// NaN, +inf or nothing but -inf, m or sum is such that log p is NaN.
template <typename Real>
struct SoftmaxSums {
  Real max = -std::numeric_limits<Real>::infinity();
  double sum = 0.0;
  double weighted = 0.0;

  // Adds `count` more numbers, a multiple of kLanes and at most kChunk; scale = log2(e) / t.
  template <bool kWeighted>
  void fold(const Real* x, std::int64_t count, Real scale) {
    rise_to(largest(x, count), scale);
    // While all numbers so far are -inf, any finite shift will do: 2^(-inf - 0) is 0.
    const Real shift = max == -std::numeric_limits<Real>::infinity() ? Real(0) : max;
    Real sums[kLanes] = {}, weighteds[kLanes] = {};
    for (std::int64_t j = 0; j < count; j += kLanes) {
      // The next chunk comes from memory while this one is computed.
      for (std::int64_t k = 0; k < kLanes; k += 64 / sizeof(Real)) prefetch(x + j + k + kChunk);
      for (std::int64_t k = 0; k < kLanes; ++k) {
        const Real d = (x[j + k] - shift) * scale;
        const Real e = exp2_nonpositive(d);
        sums[k] += e;
        if (kWeighted) weighteds[k] = madd(e, finite_weight(d), weighteds[k]);
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
  double entropy() const { return log_sum() - kLog2 * weighted / sum; }

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

  void rise_to(Real top, Real scale) {
    if (!(top > max)) return;
    if (max != -std::numeric_limits<Real>::infinity()) {
      const double fall = (static_cast<double>(max) - top) * scale;
      const double factor = std::exp2(fall);
      weighted = factor * (weighted + fall * sum);
      sum *= factor;
    }
    max = top;
  }
};

}  // namespace ppo_fast::PPO_FAST_ISA
