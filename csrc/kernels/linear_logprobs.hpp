// What linear_logprobs does between its matrix products: a tile of logits goes into the running
// softmax statistics of its rows, and later becomes the gradient of the product it came from.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "base/dtype.hpp"
#include "base/parallel.hpp"
#include "base/softmax.hpp"
#include "kernels/logprobs.hpp"

namespace ppo_fast {

// The columns [first_token, first_token + width) of the logits of N tokens, Real (float or double)
// [N, width] and contiguous, and how a product W h becomes logits:
//
//   z = scale (W h + bias)        x = softcap tanh(z / softcap), or z without a softcap
struct LogitTile {
  Dtype dtype;
  std::int64_t num_rows;
  std::int64_t width;
  std::int64_t first_token;
  const void* bias;  // Real [width], or null
  double scale;
  double softcap;  // 0: none
};

struct FoldArgs {
  LogitTile tile;
  void* logits;                // in: W h; out: x
  const std::int64_t* labels;  // [N]
  double temperature;
  bool with_entropy;
  double* state;  // [N, 4]: maximum, sum, weighted sum (SoftmaxSums), the label's x
};

struct FinishArgs {
  Dtype dtype;
  std::int64_t num_rows;
  const double* state;  // [N, 4]
  double temperature;
  void* logprobs;  // out, Real [N]
  void* entropy;   // out, Real [N], or null
  void* stats;     // out, Real [N, 2], as of LogprobsArgs
};

struct TileGradientArgs {
  LogitTile tile;
  const void* logits;  // x, or W h where `shaped` is false; Real [.., width]
  bool shaped;
  const std::int64_t* source;  // [N]: the row of `logits` to read for each row; null: its own
  const std::int64_t* labels;  // [N]
  double temperature;
  const void* stats;          // Real [N, 2]
  const void* entropy;        // Real [N], or null where grad_entropy is
  const void* grad_logprobs;  // Real [N], a; or null: 0
  const void* grad_entropy;   // Real [N], b; or null: 0
  void* gradient;             // out, dL/d(W h), Real [N, width]; may be `logits` without `source`
};

namespace PPO_FAST_ISA {

// W h -> x, `count` numbers from column `start` on.
template <typename Real>
void shape_logits(const LogitTile& tile, const Real* product, std::int64_t start,
                  std::int64_t count, Real* x) {
  const auto* bias = static_cast<const Real*>(tile.bias);
  const Real scale = static_cast<Real>(tile.scale), softcap = static_cast<Real>(tile.softcap);
  if (x != product) std::copy(product, product + count, x);
  if (bias != nullptr) {
    for (std::int64_t j = 0; j < count; ++j) x[j] += bias[start + j];
  }
  if (scale != Real(1)) {
    for (std::int64_t j = 0; j < count; ++j) x[j] *= scale;
  }
  if (softcap != Real(0)) {
    for (std::int64_t j = 0; j < count; ++j) x[j] = softcap * tanh(x[j] / softcap);
  }
}

template <typename Real>
void fold_row(const FoldArgs& args, std::int64_t i) {
  const LogitTile& tile = args.tile;
  Real* row = static_cast<Real*>(args.logits) + i * tile.width;
  double* state = args.state + 4 * i;
  const Real scale = log2_scale<Real>(args.temperature);
  SoftmaxSums<Real> sums{static_cast<Real>(state[0]), state[1], state[2]};
  Chunk<Real> room;
  for (std::int64_t start = 0; start < tile.width; start += kChunk) {
    const std::int64_t count = std::min(kChunk, tile.width - start);
    shape_logits(tile, row + start, start, count, row + start);
    const Real* chunk = load_chunk(row + start, count, &room);
    if (args.with_entropy) {
      sums.template fold<true>(chunk, round_up(count), scale);
    } else {
      sums.template fold<false>(chunk, round_up(count), scale);
    }
  }
  const std::int64_t column = args.labels[i] - tile.first_token;
  if (0 <= column && column < tile.width) state[3] = row[column];
  state[0] = sums.max;
  state[1] = sums.sum;
  state[2] = sums.weighted;
}

// Folds a tile into the statistics of its rows, and overwrites W h with x. Bytes moved: the tile
// once; it is written only where the head has a bias, a scale or a softcap.
inline void fold_tile(const FoldArgs& args, int num_threads) {
  with_real(args.tile.dtype, [&](auto* type) {
    using Real = std::remove_pointer_t<decltype(type)>;
    parallel_for(args.tile.num_rows, args.tile.width, num_threads,
                 [&](std::int64_t i) { fold_row<Real>(args, i); });
  });
}

// After the last tile: log-probs, entropies, and what backward needs, 8 bytes a token.
inline void finish_rows(const FinishArgs& args) {
  with_real(args.dtype, [&](auto* type) {
    using Real = std::remove_pointer_t<decltype(type)>;
    auto* stats = static_cast<Real*>(args.stats);
    for (std::int64_t i = 0; i < args.num_rows; ++i) {
      const double* state = args.state + 4 * i;
      const SoftmaxSums<Real> sums{static_cast<Real>(state[0]), state[1], state[2]};
      static_cast<Real*>(args.logprobs)[i] =
          static_cast<Real>((state[3] - state[0]) / args.temperature - sums.log_sum());
      if (args.entropy != nullptr) {
        static_cast<Real*>(args.entropy)[i] = static_cast<Real>(sums.entropy());
      }
      stats[2 * i] = sums.max;
      stats[2 * i + 1] = static_cast<Real>(sums.sum);
    }
  });
}

template <typename Real>
void tile_gradient_row(const TileGradientArgs& args, std::int64_t i) {
  const LogitTile& tile = args.tile;
  const std::int64_t from = args.source == nullptr ? i : args.source[i];
  const Real* row = static_cast<const Real*>(args.logits) + from * tile.width;
  Real* gradient = static_cast<Real*>(args.gradient) + i * tile.width;
  const double a =
      args.grad_logprobs == nullptr ? 0.0 : static_cast<const Real*>(args.grad_logprobs)[i];
  const double b =
      args.grad_entropy == nullptr ? 0.0 : static_cast<const Real*>(args.grad_entropy)[i];
  const double entropy = b == 0.0 ? 0.0 : static_cast<const Real*>(args.entropy)[i];
  const auto* stats = static_cast<const Real*>(args.stats) + 2 * i;
  const RowGradient<Real> of_logit(stats[0], stats[1], a, b, entropy, args.temperature);
  const Real scale = static_cast<Real>(tile.scale), softcap = static_cast<Real>(tile.softcap);
  const std::int64_t column = args.labels[i] - tile.first_token;
  Chunk<Real> room;
  for (std::int64_t start = 0; start < tile.width; start += kChunk) {
    const std::int64_t count = std::min(kChunk, tile.width - start);
    const Real* x = row + start;
    if (!args.shaped) {
      shape_logits(tile, x, start, count, room.numbers);
      x = room.numbers;
    }
    Real* out = gradient + start;
    const bool has_label = start <= column && column < start + count;
    const Real chosen = has_label ? x[column - start] : Real(0);
    const Real slope_here = scale * (Real(1) - (chosen / softcap) * (chosen / softcap));
    if (softcap != Real(0)) {
      for (std::int64_t j = 0; j < count; ++j) {
        const Real share = x[j] / softcap;
        out[j] = of_logit(x[j]) * (scale * (Real(1) - share * share));
      }
    } else {
      for (std::int64_t j = 0; j < count; ++j) out[j] = of_logit(x[j]) * scale;
    }
    if (has_label) {
      const double at_label = of_logit(chosen) + a / args.temperature;
      out[column - start] = static_cast<Real>(at_label * (softcap != Real(0) ? slope_here : scale));
    }
  }
}

// Turns a tile of logits into dL/d(W h), a factor of both products of the backward pass:
//
//   dL/d(W h) = scale (1 - (x / softcap)^2) dL/dx,   with dL/dx as in logprobs.hpp
//
// In place, or from a tile that is kept for another backward. Bytes moved: the tile twice.
inline void tile_gradient(const TileGradientArgs& args, int num_threads) {
  with_real(args.tile.dtype, [&](auto* type) {
    using Real = std::remove_pointer_t<decltype(type)>;
    parallel_for(args.tile.num_rows, args.tile.width, num_threads,
                 [&](std::int64_t i) { tile_gradient_row<Real>(args, i); });
  });
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
