// y = x W^T + bias for the few rows of a decoding step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "base/dot.hpp"
#include "base/dtype.hpp"
#include "base/lanes.hpp"
#include "base/parallel.hpp"

namespace ppo_fast {

// N rows of D inputs, V outputs. Contiguous but for the rows of the weight. The weight is of the
// dtype of the others, or in half precision or int8 where they are float.
struct FewRowLinearArgs {
  Dtype dtype;
  Dtype weight_dtype;
  const void* x;        // [N, D]
  const void* weight;   // [V, D], rows weight_stride elements apart
  const void* bias;     // [V], or null
  const float* scales;  // [V], factors of the products of a weight in int8, else null
  void* y;              // out, [N, V]
  std::int64_t num_rows;
  std::int64_t num_inputs;
  std::int64_t num_outputs;
  std::int64_t weight_stride;
};

namespace PPO_FAST_ISA {

// A tile of Outputs x Rows dot products, in registers; each step loads Outputs + Rows vectors for
// Outputs * Rows multiplications. 3 x 4 of 16 registers, and 6 x 4 of 32, leave some for the loads.
constexpr std::int64_t kTileOutputs = kVectorBytes == 64 ? 6 : 3;
constexpr std::int64_t kTileRows = 4;
// Outputs that a thread takes at a time: their weights are still in a cache for the next rows.
constexpr std::int64_t kOutputsAtATime = 24;

template <typename W>
using Operand = typename Dot<W>::Operand;

// Returns a product with row `output` of the weight, by whose scale one in int8 is multiplied.
template <typename W>
PPO_FAST_INLINE Compute<W> scaled(Compute<W> product, [[maybe_unused]] const float* scales,
                                  [[maybe_unused]] std::int64_t output) {
  if constexpr (std::is_same_v<W, Int8>) return product * scales[output];
  return product;
}

// Returns nanoseconds: a multiplication takes 1/20, reading a weight 1/4.
inline std::int64_t product_cost(std::int64_t num_weights, std::int64_t num_rows) {
  return num_weights * std::max<std::int64_t>(num_rows, 5) / 20;
}

// Every product is summed in the same order, whatever the tile: a row's bits do not depend on the
// other rows.
template <typename W, int Outputs, int Rows>
PPO_FAST_INLINE void dot_tile(const W* weight, std::int64_t weight_stride, const Operand<W>* x,
                              std::int64_t count, Compute<W> (&dots)[kTileOutputs][kTileRows]) {
  constexpr std::int64_t kStep = Dot<W>::kStep;
  Lanes<Compute<W>> sums[Outputs][kTileRows] = {};
  std::int64_t k = 0;
  for (; k + kStep <= count; k += kStep) {
    typename Dot<W>::Vector weights[Outputs];
    for (int o = 0; o < Outputs; ++o) {
      const W* from = weight + o * weight_stride + k;
      // Of a thread's next outputs: rows are too short for the processor to find out by itself.
      prefetch_to_l2(from + kOutputsAtATime * weight_stride);
      weights[o] = Dot<W>::weights(from);
    }
    for (int r = 0; r < Rows; ++r) {
      const auto row = Dot<W>::operands(x + r * count + k);
      for (int o = 0; o < Outputs; ++o) sums[o][r] = Dot<W>::add(weights[o], row, sums[o][r]);
    }
  }
  for (int o = 0; o < Outputs; ++o) sum_each(sums[o], dots[o]);
  for (; k < count; ++k) {
    for (int o = 0; o < Outputs; ++o) {
      for (int r = 0; r < Rows; ++r) {
        dots[o][r] =
            madd(widen(weight[o * weight_stride + k]), widen(x[r * count + k]), dots[o][r]);
      }
    }
  }
}

template <typename W, int Outputs>
PPO_FAST_INLINE void dot_rows(const W* weight, std::int64_t weight_stride, const Operand<W>* x,
                              std::int64_t count, std::int64_t rows,
                              Compute<W> (&dots)[kTileOutputs][kTileRows]) {
  switch (rows) {
    case 1:
      return dot_tile<W, Outputs, 1>(weight, weight_stride, x, count, dots);
    case 2:
      return dot_tile<W, Outputs, 2>(weight, weight_stride, x, count, dots);
    case 3:
      return dot_tile<W, Outputs, 3>(weight, weight_stride, x, count, dots);
    default:
      return dot_tile<W, Outputs, 4>(weight, weight_stride, x, count, dots);
  }
}

// Calls emit(row, output, product) for outputs [first, last) of all rows. `x` is [num_rows, count];
// `weight` starts at output `first`, and its rows are weight_stride apart.
template <typename W, typename Emit>
PPO_FAST_INLINE void products(const W* weight, std::int64_t weight_stride, const Operand<W>* x,
                              std::int64_t num_rows, std::int64_t count, std::int64_t first,
                              std::int64_t last, Emit emit) {
  if constexpr (Dot<W>::kWidenFirst) {
    if (num_rows > kTileRows) {  // the sums are the same, to the bit
      static thread_local std::vector<Compute<W>> widened;
      widened.resize(static_cast<std::size_t>((last - first) * count));
      for (std::int64_t v = 0; v < last - first; ++v) {
        const W* from = weight + v * weight_stride;
        Compute<W>* to = widened.data() + v * count;
        for (std::int64_t k = 0; k < count; ++k) to[k] = widen(from[k]);
      }
      const Compute<W>* converted = widened.data();
      return products(converted, count, x, num_rows, count, first, last, emit);
    }
  }
  for (std::int64_t row = 0; row < num_rows; row += kTileRows) {
    const std::int64_t rows = std::min(kTileRows, num_rows - row);
    for (std::int64_t v = first; v < last;) {
      const bool whole = v + kTileOutputs <= last;
      const std::int64_t outputs = whole ? kTileOutputs : 1;
      const W* from = weight + (v - first) * weight_stride;
      Compute<W> dots[kTileOutputs][kTileRows];
      if (whole) {
        dot_rows<W, kTileOutputs>(from, weight_stride, x + row * count, count, rows, dots);
      } else {
        dot_rows<W, 1>(from, weight_stride, x + row * count, count, rows, dots);
      }
      for (std::int64_t o = 0; o < outputs; ++o) {
        for (std::int64_t r = 0; r < rows; ++r) emit(row + r, v + o, dots[o][r]);
      }
      v += outputs;
    }
  }
}

template <typename T, typename W>
void few_row_products(const FewRowLinearArgs& args, int num_threads) {
  const std::int64_t count = args.num_inputs;
  const T* given = static_cast<const T*>(args.x);
  const Operand<W>* x = nullptr;
  std::vector<Operand<W>> converted;
  constexpr bool kRounds = !std::is_same_v<T, W> && !std::is_same_v<W, Int8>;
  if constexpr (std::is_same_v<T, Operand<W>> && !kRounds) {
    x = given;
  } else {
    converted.resize(static_cast<std::size_t>(args.num_rows * count));
    for (std::size_t i = 0; i < converted.size(); ++i) {
      converted[i] = Dot<W>::operand(widen(given[i]));
    }
    x = converted.data();
  }
  const T* bias = static_cast<const T*>(args.bias);
  T* y = static_cast<T*>(args.y);
  const std::int64_t blocks = (args.num_outputs + kOutputsAtATime - 1) / kOutputsAtATime;
  const std::int64_t cost = product_cost(kOutputsAtATime * count, args.num_rows);
  const int threads = useful_threads(blocks * cost, num_threads);
  const auto block = [&](std::int64_t i) {
    const std::int64_t first = i * kOutputsAtATime;
    const std::int64_t last = std::min(first + kOutputsAtATime, args.num_outputs);
    const W* weight = static_cast<const W*>(args.weight) + first * args.weight_stride;
    products(weight, args.weight_stride, x, args.num_rows, count, first, last,
             [&](std::int64_t row, std::int64_t v, Compute<W> product) {
               const Compute<W> shift = bias == nullptr ? Compute<W>(0) : widen(bias[v]);
               narrow(scaled<W>(product, args.scales, v) + shift, y + row * args.num_outputs + v);
             });
  };
  run_loops(threads, Loop{blocks, kShare, block});
}

inline void few_row_linear(const FewRowLinearArgs& args, int num_threads) {
  with_dtype(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, float>) {
      if (args.weight_dtype == Dtype::bfloat16)
        return few_row_products<float, BFloat16>(args, num_threads);
      if (args.weight_dtype == Dtype::float16)
        return few_row_products<float, Float16>(args, num_threads);
      if (args.weight_dtype == Dtype::int8) return few_row_products<float, Int8>(args, num_threads);
    }
    few_row_products<T, T>(args, num_threads);
  });
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
