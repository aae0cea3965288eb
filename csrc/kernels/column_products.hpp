// x W for few rows and a weight that is stored [inputs, outputs], as those of GPT-2's layers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "base/dot.hpp"
#include "base/dtype.hpp"
#include "base/lanes.hpp"
#include "kernels/few_row_linear.hpp"

namespace ppo_fast::PPO_FAST_ISA {

// Outputs that a thread takes at a time, and inputs of which their weights are copied: rows of a
// weight are often a multiple of 4096 bytes apart, so that few of them fit in a cache at once.
constexpr std::int64_t kColumnsAtATime = 64;
constexpr std::int64_t kInputsAtATime = 64;
// A tile of sums in registers: 4 vectors of outputs x 4 rows of 32 registers, or 2 x 4 of 16.
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;
constexpr int kColumnRows = 4;

template <typename Real>
PPO_FAST_INLINE Lanes<Real> repeated(Real x) {
  Lanes<Real> lanes;
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    lanes.numbers = _mm512_set1_ps(x);
    return lanes;
  }
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    lanes.numbers = _mm256_set1_ps(x);
    return lanes;
  }
#endif
  for (int l = 0; l < Lanes<Real>::kWidth; ++l) lanes.numbers[l] = x;
  return lanes;
}

// Adds x W to the sums of a tile; rows of the weight and of the sums are kColumnsAtATime apart, rows
// of x x_stride. `next` is a weight's row per input, next_stride apart, that is read after these.
template <int Rows, typename Real, typename W>
PPO_FAST_INLINE void column_tile(const Real* weight, const Real* x, std::int64_t x_stride,
                                 std::int64_t count, Real* sums, const W* next,
                                 std::int64_t next_stride) {
  constexpr int kWidth = Lanes<Real>::kWidth;
  Lanes<Real> tile[Rows][kTileVectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      tile[r][v] = Lanes<Real>::load(sums + r * kColumnsAtATime + v * kWidth);
    }
  }
  for (std::int64_t k = 0; k < count; ++k) {
    if (next != nullptr) {
      for (int v = 0; v < kTileVectors; ++v) prefetch(next + k * next_stride + v * kWidth);
    }
    Lanes<Real> weights[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) {
      weights[v] = Lanes<Real>::load(weight + k * kColumnsAtATime + v * kWidth);
    }
    for (int r = 0; r < Rows; ++r) {
      const Lanes<Real> row = repeated(x[r * x_stride + k]);
      for (int v = 0; v < kTileVectors; ++v) tile[r][v] = madd(weights[v], row, tile[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      std::memcpy(sums + r * kColumnsAtATime + v * kWidth, &tile[r][v].numbers,
                  sizeof(tile[r][v].numbers));
    }
  }
}

// Calls emit(row, output, product) for `outputs` <= kColumnsAtATime outputs of all rows. `x` is
// [num_rows, count]; `weight` [count, outputs] has rows weight_stride apart. Products are summed in
// the order of the inputs: a row's bits do not depend on the other rows.
template <typename W, typename Emit>
void column_products(const W* weight, std::int64_t weight_stride, const Operand<W>* x,
                     std::int64_t num_rows, std::int64_t count, std::int64_t outputs, Emit emit) {
  using Real = Compute<W>;
  constexpr bool kConverts = !std::is_same_v<Operand<W>, Real>;
  constexpr std::int64_t kTile = kTileVectors * Lanes<Real>::kWidth;
  static thread_local std::vector<Real> room;
  room.resize(static_cast<std::size_t>(kInputsAtATime * kColumnsAtATime +
                                       num_rows * (kColumnsAtATime + kInputsAtATime)));
  Real *copy = room.data(), *sums = copy + kInputsAtATime * kColumnsAtATime;
  Real* converted = sums + num_rows * kColumnsAtATime;
  std::fill_n(sums, num_rows * kColumnsAtATime, Real(0));
  for (std::int64_t first = 0; first < count; first += kInputsAtATime) {
    const std::int64_t inputs = std::min(kInputsAtATime, count - first);
    const W* from = weight + first * weight_stride;
    for (std::int64_t k = 0; k < inputs; ++k) {
      Real* to = copy + k * kColumnsAtATime;
      for (std::int64_t o = 0; o < outputs; ++o) to[o] = widen(from[k * weight_stride + o]);
      for (std::int64_t o = outputs; o < kColumnsAtATime; ++o) to[o] = Real(0);
    }
    const Real* rows = nullptr;
    std::int64_t row_stride = count;
    if constexpr (kConverts) {
      for (std::int64_t r = 0; r < num_rows; ++r) {
        for (std::int64_t k = 0; k < inputs; ++k) {
          converted[r * kInputsAtATime + k] = widen(x[r * count + first + k]);
        }
      }
      rows = converted, row_stride = kInputsAtATime;
    } else {
      rows = x + first;
    }
    const bool more = first + inputs < count;
    for (std::int64_t o = 0; o < outputs; o += kTile) {
      for (std::int64_t r = 0; r < num_rows; r += kColumnRows) {
        const W* next = more && r == 0 ? from + inputs * weight_stride + o : nullptr;
        const auto tile = [&](auto rows_of_tile) {
          column_tile<decltype(rows_of_tile)::value>(copy + o, rows + r * row_stride, row_stride,
                                                     inputs, sums + r * kColumnsAtATime + o, next,
                                                     weight_stride);
        };
        switch (std::min<std::int64_t>(kColumnRows, num_rows - r)) {
          case 1:
            tile(std::integral_constant<int, 1>());
            break;
          case 2:
            tile(std::integral_constant<int, 2>());
            break;
          case 3:
            tile(std::integral_constant<int, 3>());
            break;
          default:
            tile(std::integral_constant<int, kColumnRows>());
        }
      }
    }
  }
  for (std::int64_t r = 0; r < num_rows; ++r) {
    for (std::int64_t o = 0; o < outputs; ++o) emit(r, o, sums[r * kColumnsAtATime + o]);
  }
}

}  // namespace ppo_fast::PPO_FAST_ISA
