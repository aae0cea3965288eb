// Masked whitening: mean 0 and variance 1 over the valid tokens.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "base/dtype.hpp"
#include "base/parallel.hpp"
#include "base/reduce.hpp"

namespace ppo_fast {

// B sequences of T tokens; Real is float or double, by `dtype`. Matrices are [B, T], contiguous.
struct WhitenArgs {
  Dtype dtype;
  const void* values;        // Real
  const std::uint8_t* mask;  // 1: the token counts
  void* whitened;            // out, Real
  double* scale;             // out, [1]: 1 / sqrt(s2 + 1e-8)
  std::int64_t num_rows;
  std::int64_t num_steps;
};

struct WhitenBackwardArgs {
  Dtype dtype;
  const void* grad_whitened;  // Real
  const void* whitened;       // Real
  const std::uint8_t* mask;
  const double* scale;  // [1]
  void* grad_values;    // out, Real
  std::int64_t num_rows;
  std::int64_t num_steps;
};

namespace PPO_FAST_ISA {

// The sums of `first(i)` and `second(i)` over the valid tokens i of all rows, i counted from the
// start of the batch. Rows are summed each by itself and merged in their order: the bits do not
// depend on num_threads.
struct TwoSums {
  double first = 0.0;
  double second = 0.0;
};

template <typename First, typename Second>
TwoSums two_sums(const std::uint8_t* mask, std::int64_t num_rows, std::int64_t num_steps,
                 int num_threads, First first, Second second) {
  std::vector<TwoSums> rows(static_cast<std::size_t>(num_rows));
  parallel_for(num_rows, 2 * num_steps, num_threads, [&](std::int64_t row) {
    double firsts[kTokenBlock], seconds[kTokenBlock];
    for_blocks(num_steps, [&](std::int64_t start, std::int64_t count) {
      const std::int64_t offset = row * num_steps + start;
      for (std::int64_t j = 0; j < count; ++j) {
        const auto valid = static_cast<double>(mask[offset + j]);
        firsts[j] = masked(first(offset + j), valid);
        seconds[j] = masked(second(offset + j), valid);
      }
      rows[row].first += sum(firsts, count);
      rows[row].second += sum(seconds, count);
    });
  });
  TwoSums total;
  for (const TwoSums& row : rows) {
    total.first += row.first;
    total.second += row.second;
  }
  return total;
}

// Writes `value(i)` where the mask is true, and 0 elsewhere.
template <typename Real, typename Value>
void write_masked(const std::uint8_t* mask, std::int64_t num_rows, std::int64_t num_steps,
                  int num_threads, Real* to, Value value) {
  parallel_for(num_rows, num_steps, num_threads, [&](std::int64_t row) {
    for (std::int64_t i = row * num_steps; i < (row + 1) * num_steps; ++i) {
      to[i] = static_cast<Real>(masked(value(i), static_cast<double>(mask[i])));
    }
  });
}

// With n valid tokens x over the whole batch, in double whatever Real is:
//
//   m = sum(x) / n      c = x - m - sum(x - m) / n      s2 = sum(c^2) / (n - 1)
//   y = c / sqrt(s2 + 1e-8), and 0 where n <= 1
//
// The second sum corrects the rounding of m. s2 is computed in the same pass, by the corrected
// two-pass algorithm (Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance",
// eq. 1.7): sum(c^2) = sum((x - m)^2) - sum(x - m)^2 / n. Saved for backward: y, which the caller
// holds anyway, and one number. Bytes moved a token in float32: 19 in three passes.
inline void whiten(const WhitenArgs& args, int num_threads) {
  const std::int64_t num_rows = args.num_rows, num_steps = args.num_steps;
  with_real(args.dtype, [&](auto* type) {
    using Real = std::remove_pointer_t<decltype(type)>;
    const auto* x = static_cast<const Real*>(args.values);
    const TwoSums total = two_sums(
        args.mask, num_rows, num_steps, num_threads,
        [=](std::int64_t i) { return static_cast<double>(x[i]); },
        [](std::int64_t) { return 1.0; });
    const double n = total.second, mean = n > 0.0 ? total.first / n : 0.0;
    const TwoSums centred = two_sums(
        args.mask, num_rows, num_steps, num_threads,
        [=](std::int64_t i) { return static_cast<double>(x[i]) - mean; },
        [=](std::int64_t i) {
          const double c = static_cast<double>(x[i]) - mean;
          return c * c;
        });
    const double rest = n > 0.0 ? centred.first / n : 0.0;
    const double squares = centred.second - centred.first * rest;
    // A single token equals its mean: its deviation is 0.
    const double scale = n > 1.0 ? 1.0 / std::sqrt(squares / (n - 1.0) + 1e-8) : 0.0;
    *args.scale = scale;
    write_masked(args.mask, num_rows, num_steps, num_threads, static_cast<Real*>(args.whitened),
                 [=](std::int64_t i) { return (static_cast<double>(x[i]) - mean - rest) * scale; });
  });
}

// With g = dL/dy, over the valid tokens, and s the scale:
//
//   dL/dx = s [ g - sum(g) / n - y sum(g y) / (n - 1) ]
//
// (c = x - m gives the second term, and ds/dx = -s^2 y / (n - 1) the third.) Bytes moved a token in
// float32: 22 in two passes.
inline void whiten_backward(const WhitenBackwardArgs& args, int num_threads) {
  const std::int64_t num_rows = args.num_rows, num_steps = args.num_steps;
  std::int64_t tokens = 0;
  for (std::int64_t i = 0; i < num_rows; ++i) {
    tokens += row_length(args.mask + i * num_steps, num_steps).tokens;
  }
  with_real(args.dtype, [&](auto* type) {
    using Real = std::remove_pointer_t<decltype(type)>;
    const auto* g = static_cast<const Real*>(args.grad_whitened);
    const auto* y = static_cast<const Real*>(args.whitened);
    const TwoSums total = two_sums(
        args.mask, num_rows, num_steps, num_threads,
        [=](std::int64_t i) { return static_cast<double>(g[i]); },
        [=](std::int64_t i) { return static_cast<double>(g[i]) * static_cast<double>(y[i]); });
    const auto n = static_cast<double>(tokens);
    const double mean = n > 1.0 ? total.first / n : 0.0;
    const double slope = n > 1.0 ? total.second / (n - 1.0) : 0.0;
    const double scale = *args.scale;
    write_masked(args.mask, num_rows, num_steps, num_threads, static_cast<Real*>(args.grad_values),
                 [=](std::int64_t i) {
                   const auto grad = static_cast<double>(g[i]);
                   return (grad - mean - static_cast<double>(y[i]) * slope) * scale;
                 });
  });
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
