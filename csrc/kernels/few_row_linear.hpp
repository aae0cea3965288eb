// y = x W^T + bias for the few rows of a decoding step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "base/dtype.hpp"
#include "base/lanes.hpp"
#include "base/parallel.hpp"

namespace ppo_fast {

// N rows of D inputs, V outputs. All of `dtype`, contiguous but for the rows of the weight.
struct FewRowLinearArgs {
  Dtype dtype;
  const void* x;       // [N, D]
  const void* weight;  // [V, D], rows weight_stride elements apart
  const void* bias;    // [V], or null
  void* y;             // out, [N, V]
  std::int64_t num_rows;
  std::int64_t num_inputs;
  std::int64_t num_outputs;
  std::int64_t weight_stride;
};

namespace PPO_FAST_ISA {

// A tile of Outputs x Rows dot products, in registers; each step loads Outputs +
// Rows vectors for Outputs * Rows multiplications. 3 x 4 leaves registers for the loads.
constexpr std::int64_t kTileOutputs = 3;
constexpr std::int64_t kTileRows = 4;
// Outputs that a thread takes at a time: their weights are still in a cache for the next rows.
constexpr std::int64_t kOutputsAtATime = 8 * kTileOutputs;

// Returns nanoseconds: a multiplication takes 1/20, reading a weight 1/4.
inline std::int64_t product_cost(std::int64_t num_weights, std::int64_t num_rows) {
  return num_weights * std::max<std::int64_t>(num_rows, 5) / 20;
}

// Every product is summed in the same order, whatever the tile: a row's bits do not depend on the
// other rows.
template <typename Real, int Outputs, int Rows>
PPO_FAST_INLINE void dot_tile(const Real* weight, std::int64_t weight_stride, const Real* x,
                              std::int64_t count, Real (&dots)[kTileOutputs][kTileRows]) {
  constexpr std::int64_t kWidth = Lanes<Real>::kWidth;
  Lanes<Real> sums[Outputs][kTileRows] = {};
  std::int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) {
    Lanes<Real> weights[Outputs];
    for (int o = 0; o < Outputs; ++o)
      weights[o] = Lanes<Real>::load(weight + o * weight_stride + k);
    for (int r = 0; r < Rows; ++r) {
      const auto row = Lanes<Real>::load(x + r * count + k);
      for (int o = 0; o < Outputs; ++o) sums[o][r] = madd(weights[o], row, sums[o][r]);
    }
  }
  for (int o = 0; o < Outputs; ++o) sum_each(sums[o], dots[o]);
  for (; k < count; ++k) {
    for (int o = 0; o < Outputs; ++o) {
      for (int r = 0; r < Rows; ++r) {
        dots[o][r] = madd(weight[o * weight_stride + k], x[r * count + k], dots[o][r]);
      }
    }
  }
}

template <typename Real, int Outputs>
PPO_FAST_INLINE void dot_rows(const Real* weight, std::int64_t weight_stride, const Real* x,
                              std::int64_t count, std::int64_t rows,
                              Real (&dots)[kTileOutputs][kTileRows]) {
  switch (rows) {
    case 1:
      return dot_tile<Real, Outputs, 1>(weight, weight_stride, x, count, dots);
    case 2:
      return dot_tile<Real, Outputs, 2>(weight, weight_stride, x, count, dots);
    case 3:
      return dot_tile<Real, Outputs, 3>(weight, weight_stride, x, count, dots);
    default:
      return dot_tile<Real, Outputs, 4>(weight, weight_stride, x, count, dots);
  }
}

// Calls emit(row, output, product) for outputs [first, last) of all rows. `x` is [num_rows, count];
// `weight` starts at output `first`, and its rows are weight_stride apart.
template <typename Real, typename Emit>
PPO_FAST_INLINE void products(const Real* weight, std::int64_t weight_stride, const Real* x,
                              std::int64_t num_rows, std::int64_t count, std::int64_t first,
                              std::int64_t last, Emit emit) {
  for (std::int64_t row = 0; row < num_rows; row += kTileRows) {
    const std::int64_t rows = std::min(kTileRows, num_rows - row);
    for (std::int64_t v = first; v < last;) {
      const bool whole = v + kTileOutputs <= last;
      const std::int64_t outputs = whole ? kTileOutputs : 1;
      const Real* from = weight + (v - first) * weight_stride;
      Real dots[kTileOutputs][kTileRows];
      if (whole) {
        dot_rows<Real, kTileOutputs>(from, weight_stride, x + row * count, count, rows, dots);
      } else {
        dot_rows<Real, 1>(from, weight_stride, x + row * count, count, rows, dots);
      }
      for (std::int64_t o = 0; o < outputs; ++o) {
        for (std::int64_t r = 0; r < rows; ++r) emit(row + r, v + o, dots[o][r]);
      }
      v += outputs;
    }
  }
}

// Computes outputs [first, last) of all rows. x [N, D] is in the type of the arithmetic.
template <typename T>
void some_outputs(const FewRowLinearArgs& args, const Compute<T>* x, std::int64_t first,
                  std::int64_t last) {
  using Real = Compute<T>;
  const std::int64_t count = args.num_inputs;
  const T* weight = static_cast<const T*>(args.weight) + first * args.weight_stride;
  const T* bias = static_cast<const T*>(args.bias);
  T* y = static_cast<T*>(args.y);
  const auto emit = [&](std::int64_t row, std::int64_t v, Real product) {
    const Real shift = bias == nullptr ? Real(0) : widen(bias[v]);
    narrow(product + shift, y + row * args.num_outputs + v);
  };
  if constexpr (std::is_same_v<T, Real>) {
    products(weight, args.weight_stride, x, args.num_rows, count, first, last, emit);
  } else {
    std::vector<Real> widened(static_cast<std::size_t>((last - first) * count));
    for (std::int64_t v = 0; v < last - first; ++v) {
      const T* from = weight + v * args.weight_stride;
      for (std::int64_t k = 0; k < count; ++k) widened[v * count + k] = widen(from[k]);
    }
    products(static_cast<const Real*>(widened.data()), count, x, args.num_rows, count, first, last,
             emit);
  }
}

inline void few_row_linear(const FewRowLinearArgs& args, int num_threads) {
  with_dtype(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Real = Compute<T>;
    const T* given = static_cast<const T*>(args.x);
    std::vector<Real> widened;
    const Real* x = nullptr;
    if constexpr (std::is_same_v<T, Real>) {
      x = given;
    } else {
      widened.resize(static_cast<std::size_t>(args.num_rows * args.num_inputs));
      for (std::size_t i = 0; i < widened.size(); ++i) widened[i] = widen(given[i]);
      x = widened.data();
    }
    const std::int64_t blocks = (args.num_outputs + kOutputsAtATime - 1) / kOutputsAtATime;
    const std::int64_t cost = product_cost(kOutputsAtATime * args.num_inputs, args.num_rows);
    parallel_for(blocks, cost, num_threads, [&](std::int64_t i) {
      const std::int64_t first = i * kOutputsAtATime;
      some_outputs<T>(args, x, first, std::min(first + kOutputsAtATime, args.num_outputs));
    });
  });
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
