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

// Outputs of a panel. A thread takes up to kMostPanels next to one another at a time, so that it
// reads long pieces of the weight's rows.
constexpr std::int64_t kPanelOutputs = 64;
constexpr std::int64_t kMostPanels = 8;
// Inputs that are added to all sums before the next ones. Few, since rows of a weight are often a
// multiple of 4096 bytes apart, so that few fit in a cache at once; more would suit many rows.
constexpr std::int64_t kInputsAtATime = 12;
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

// Adds x W to the sums of a tile; rows of the weight are weight_stride apart, those of x x_stride,
// and those of the sums kPanelOutputs.
template <int Rows, typename Real>
PPO_FAST_INLINE void column_tile(const Real* weight, std::int64_t weight_stride, const Real* x,
                                 std::int64_t x_stride, std::int64_t count, Real* sums) {
  constexpr int kWidth = Lanes<Real>::kWidth;
  Lanes<Real> tile[Rows][kTileVectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      tile[r][v] = Lanes<Real>::load(sums + r * kPanelOutputs + v * kWidth);
    }
  }
  for (std::int64_t k = 0; k < count; ++k) {
    Lanes<Real> weights[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) {
      prefetch_to_l2(weight + (k + 2 * kInputsAtATime) * weight_stride + v * kWidth);
      weights[v] = Lanes<Real>::load(weight + k * weight_stride + v * kWidth);
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

// The same for all rows and a panel.
template <typename Real>
void column_panel(const Real* weight, std::int64_t weight_stride, const Real* x,
                  std::int64_t x_stride, std::int64_t num_rows, std::int64_t count, Real* sums) {
  constexpr std::int64_t kTile = kTileVectors * Lanes<Real>::kWidth;
  for (std::int64_t o = 0; o < kPanelOutputs; o += kTile) {
    for (std::int64_t r = 0; r < num_rows; r += kColumnRows) {
      const Real* from = x + r * x_stride;
      Real* to = sums + r * kPanelOutputs + o;
      switch (std::min<std::int64_t>(kColumnRows, num_rows - r)) {
        case 1:
          column_tile<1>(weight + o, weight_stride, from, x_stride, count, to);
          break;
        case 2:
          column_tile<2>(weight + o, weight_stride, from, x_stride, count, to);
          break;
        case 3:
          column_tile<3>(weight + o, weight_stride, from, x_stride, count, to);
          break;
        default:
          column_tile<kColumnRows>(weight + o, weight_stride, from, x_stride, count, to);
      }
    }
  }
}

// Calls emit(row, output, product) for `outputs` <= kMostPanels kPanelOutputs outputs of all rows.
// `x` is [num_rows, count]; `weight` [count, outputs] has rows weight_stride apart. Products are
// summed in the order of the inputs: a row's bits do not depend on the other rows. Weights in half
// precision, and those of less than whole panels, are copied before.
template <typename W, typename Emit>
void column_products(const W* weight, std::int64_t weight_stride, const Operand<W>* x,
                     std::int64_t num_rows, std::int64_t count, std::int64_t outputs, Emit emit) {
  using Real = Compute<W>;
  const std::int64_t panels = (outputs + kPanelOutputs - 1) / kPanelOutputs;
  const std::int64_t width = panels * kPanelOutputs;
  static thread_local std::vector<Real> room;
  room.resize(static_cast<std::size_t>(kInputsAtATime * (width + num_rows) + num_rows * width));
  Real *copy = room.data(), *sums = copy + kInputsAtATime * width;
  Real* converted = sums + num_rows * width;
  std::fill(copy, converted, Real(0));
  for (std::int64_t first = 0; first < count; first += kInputsAtATime) {
    const std::int64_t inputs = std::min(kInputsAtATime, count - first);
    const W* from = weight + first * weight_stride;
    const Real *weights = copy, *rows = converted;
    std::int64_t stride = width, row_stride = kInputsAtATime;
    bool copied = true;
    if constexpr (std::is_same_v<W, Real>) {
      if (outputs == width) weights = from, stride = weight_stride, copied = false;
    }
    if (copied) {
      for (std::int64_t k = 0; k < inputs; ++k) {
        const W* row = from + k * weight_stride;
        for (std::int64_t o = 0; o < outputs; ++o) copy[k * width + o] = widen(row[o]);
      }
    }
    if constexpr (std::is_same_v<Operand<W>, Real>) {
      rows = x + first, row_stride = count;
    } else {
      for (std::int64_t r = 0; r < num_rows; ++r) {
        for (std::int64_t k = 0; k < inputs; ++k) {
          converted[r * kInputsAtATime + k] = widen(x[r * count + first + k]);
        }
      }
    }
    for (std::int64_t p = 0; p < panels; ++p) {
      column_panel(weights + p * kPanelOutputs, stride, rows, row_stride, num_rows, inputs,
                   sums + p * num_rows * kPanelOutputs);
    }
  }
  for (std::int64_t o = 0; o < outputs; ++o) {
    const Real* panel = sums + (o / kPanelOutputs) * num_rows * kPanelOutputs + o % kPanelOutputs;
    for (std::int64_t r = 0; r < num_rows; ++r) emit(r, o, panel[r * kPanelOutputs]);
  }
}

}  // namespace ppo_fast::PPO_FAST_ISA
