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

// Outputs of a panel: those of one copy of weights. A thread takes up to kMostPanels next to one
// another at a time, so that it reads long pieces of the weight's rows. With pieces of 256 bytes,
// each in another page, 4 rows take 1.7 times as long.
constexpr std::int64_t kPanelOutputs = 64;
constexpr std::int64_t kMostPanels = 8;
// Inputs whose weights are copied at a time: a panel of them is half of a first-level cache.
constexpr std::int64_t kPanelInputs = 64;
// A tile of sums in registers: 4 vectors of outputs x 4 rows of 32 registers, or 2 x 4 of 16.
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;
constexpr int kColumnRows = 4;

// Returns how many of a product's outputs a thread takes at a time. Sums do not depend on it.
inline std::int64_t columns_at_a_time(std::int64_t outputs, int threads) {
  const std::int64_t panels = (outputs + kPanelOutputs - 1) / kPanelOutputs;
  return std::clamp<std::int64_t>(panels / threads, 1, kMostPanels) * kPanelOutputs;
}

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

// Weights to ask the memory for while others are multiplied: pieces of a panel's width, along the
// rows of a block of `width` outputs.
template <typename W>
struct Ahead {
  const W* row;
  std::int64_t stride, width, rows_left, column = 0;

  PPO_FAST_INLINE void fetch() {
    if (rows_left == 0) return;
    constexpr std::int64_t kLine = 64 / sizeof(W);
    for (std::int64_t i = 0; i < kPanelOutputs; i += kLine) prefetch(row + column + i);
    column += kPanelOutputs;
    if (column >= width) column = 0, row += stride, --rows_left;
  }
};

// Adds x W to the sums of a tile; rows of the weight and of the sums are kPanelOutputs apart, rows
// of x x_stride.
template <int Rows, typename Real, typename W>
PPO_FAST_INLINE void column_tile(const Real* weight, const Real* x, std::int64_t x_stride,
                                 std::int64_t count, Real* sums, Ahead<W>& ahead) {
  constexpr int kWidth = Lanes<Real>::kWidth;
  Lanes<Real> tile[Rows][kTileVectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      tile[r][v] = Lanes<Real>::load(sums + r * kPanelOutputs + v * kWidth);
    }
  }
  for (std::int64_t k = 0; k < count; ++k) {
    ahead.fetch();
    Lanes<Real> weights[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) {
      weights[v] = Lanes<Real>::load(weight + k * kPanelOutputs + v * kWidth);
    }
    for (int r = 0; r < Rows; ++r) {
      const Lanes<Real> row = repeated(x[r * x_stride + k]);
      for (int v = 0; v < kTileVectors; ++v) tile[r][v] = madd(weights[v], row, tile[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      std::memcpy(sums + r * kPanelOutputs + v * kWidth, &tile[r][v].numbers,
                  sizeof(tile[r][v].numbers));
    }
  }
}

// The same for all rows and a panel; its copy of weights is [count, kPanelOutputs].
template <typename Real, typename W>
void column_panel(const Real* weight, const Real* x, std::int64_t x_stride, std::int64_t num_rows,
                  std::int64_t count, Real* sums, Ahead<W>& ahead) {
  constexpr std::int64_t kTile = kTileVectors * Lanes<Real>::kWidth;
  for (std::int64_t o = 0; o < kPanelOutputs; o += kTile) {
    for (std::int64_t r = 0; r < num_rows; r += kColumnRows) {
      const Real* from = x + r * x_stride;
      Real* to = sums + r * kPanelOutputs + o;
      switch (std::min<std::int64_t>(kColumnRows, num_rows - r)) {
        case 1:
          column_tile<1>(weight + o, from, x_stride, count, to, ahead);
          break;
        case 2:
          column_tile<2>(weight + o, from, x_stride, count, to, ahead);
          break;
        case 3:
          column_tile<3>(weight + o, from, x_stride, count, to, ahead);
          break;
        default:
          column_tile<kColumnRows>(weight + o, from, x_stride, count, to, ahead);
      }
    }
  }
}

// Calls emit(row, output, product) for `outputs` <= kMostPanels kPanelOutputs outputs of all rows.
// `x` is [num_rows, count]; `weight` [count, outputs] has rows weight_stride apart. Products are
// summed in the order of the inputs: a row's bits do not depend on the other rows.
template <typename W, typename Emit>
void column_products(const W* weight, std::int64_t weight_stride, const Operand<W>* x,
                     std::int64_t num_rows, std::int64_t count, std::int64_t outputs, Emit emit) {
  using Real = Compute<W>;
  constexpr std::int64_t kPanel = kPanelInputs * kPanelOutputs;  // numbers of a copy
  const std::int64_t panels = (outputs + kPanelOutputs - 1) / kPanelOutputs;
  static thread_local std::vector<Real> room;
  room.resize(static_cast<std::size_t>(panels * (kPanel + num_rows * kPanelOutputs) +
                                       num_rows * kPanelInputs));
  Real *copies = room.data(), *sums = copies + panels * kPanel;
  Real* converted = sums + panels * num_rows * kPanelOutputs;
  std::fill(copies, converted, Real(0));
  for (std::int64_t first = 0; first < count; first += kPanelInputs) {
    const std::int64_t inputs = std::min(kPanelInputs, count - first);
    const W* from = weight + first * weight_stride;
    for (std::int64_t k = 0; k < inputs; ++k) {
      for (std::int64_t p = 0; p < panels; ++p) {
        const W* piece = from + k * weight_stride + p * kPanelOutputs;
        Real* to = copies + p * kPanel + k * kPanelOutputs;
        const std::int64_t width = std::min(kPanelOutputs, outputs - p * kPanelOutputs);
        for (std::int64_t o = 0; o < width; ++o) to[o] = widen(piece[o]);
      }
    }
    const Real* rows = converted;
    std::int64_t row_stride = kPanelInputs;
    if constexpr (std::is_same_v<Operand<W>, Real>) {
      rows = x + first, row_stride = count;
    } else {
      for (std::int64_t r = 0; r < num_rows; ++r) {
        for (std::int64_t k = 0; k < inputs; ++k) {
          converted[r * kPanelInputs + k] = widen(x[r * count + first + k]);
        }
      }
    }
    const std::int64_t after = std::min(kPanelInputs, count - first - inputs);
    Ahead<W> ahead{from + inputs * weight_stride, weight_stride, outputs, after};
    for (std::int64_t p = 0; p < panels; ++p) {
      column_panel(copies + p * kPanel, rows, row_stride, num_rows, inputs,
                   sums + p * num_rows * kPanelOutputs, ahead);
    }
  }
  for (std::int64_t o = 0; o < outputs; ++o) {
    const Real* panel = sums + (o / kPanelOutputs) * num_rows * kPanelOutputs;
    for (std::int64_t r = 0; r < num_rows; ++r) emit(r, o, panel[r * kPanelOutputs + o % kPanelOutputs]);
  }
}

}  // namespace ppo_fast::PPO_FAST_ISA
