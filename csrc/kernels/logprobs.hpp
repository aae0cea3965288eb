// Log-prob of each row's label, and the entropy of its distribution, from logits.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "base/dtype.hpp"
#include "base/parallel.hpp"
#include "base/softmax.hpp"

namespace ppo_fast {

// [N, V] logits with V contiguous. Row i starts at (i / inner) * outer_stride + (i % inner) *
// inner_stride elements, as the rows of a slice [B, :-1, V] do.
struct LogitRows {
  Dtype dtype;
  const void* start;
  std::int64_t outer_stride;
  std::int64_t inner;
  std::int64_t inner_stride;
  std::int64_t num_rows;
  std::int64_t vocab_size;
};

// Real below: float, and double for float64 logits. All but the logits contiguous.
struct LogprobsArgs {
  LogitRows logits;
  const std::int64_t* labels;  // [N]
  const bool* mask;            // [N], or null: all rows count
  double temperature;
  bool with_entropy;
  void* logprobs;  // out, Real [N]
  void* entropy;   // out, Real [N]; untouched without with_entropy
  void* stats;     // out, Real [N, 2]: the row's maximum m and sum_j exp((x_j - m) / t)
};

struct LogprobsBackwardArgs {
  LogitRows logits;
  const std::int64_t* labels;
  const bool* mask;
  double temperature;
  const void* entropy;        // Real [N]; null where grad_entropy is
  const void* stats;          // Real [N, 2]
  const void* grad_logprobs;  // Real [N], a; or null: 0
  const void* grad_entropy;   // Real [N], b; or null: 0
  void* grad_logits;          // out, of the logits' dtype, [N, V] contiguous
};

namespace PPO_FAST_ISA {

template <typename T>
PPO_FAST_INLINE const T* row_start(const LogitRows& rows, std::int64_t i) {
  return static_cast<const T*>(rows.start) + (i / rows.inner) * rows.outer_stride +
         (i % rows.inner) * rows.inner_stride;
}

// The forward pass. With t the temperature, y the label, m the maximum, z = (x - m) / t:
//
//   l = z_y - log sum_j exp(z_j)
//   H = log sum_j exp(z_j) - sum_j exp(z_j) z_j / sum_j exp(z_j)
//
// Saved for backward: m and sum_j exp(z_j), 8 bytes a row. Bytes moved: the logits once; masked
// rows are not read, and get 0.
template <typename T>
void logprobs_row(const LogprobsArgs& args, std::int64_t i) {
  using Real = Compute<T>;
  auto* logprobs = static_cast<Real*>(args.logprobs);
  auto* entropy = static_cast<Real*>(args.entropy);
  auto* stats = static_cast<Real*>(args.stats);
  if (args.mask != nullptr && !args.mask[i]) {
    logprobs[i] = stats[2 * i] = stats[2 * i + 1] = Real(0);
    if (args.with_entropy) entropy[i] = Real(0);
    return;
  }
  const T* x = row_start<T>(args.logits, i);
  const std::int64_t vocab_size = args.logits.vocab_size, label = args.labels[i];
  const Real scale = log2_scale<Real>(args.temperature);
  Chunk<Real> room;
  SoftmaxSums<Real> sums;
  for (std::int64_t start = 0; start < vocab_size; start += kChunk) {
    const std::int64_t count = std::min(kChunk, vocab_size - start);
    const Real* chunk = load_chunk(x + start, count, &room);
    if (args.with_entropy) {
      sums.template fold<true>(chunk, round_up(count), scale);
    } else {
      sums.template fold<false>(chunk, round_up(count), scale);
    }
  }
  // The public function refuses other labels, but does not check them under torch.compile.
  const bool is_token = 0 <= label && label < vocab_size;
  const double chosen = is_token ? static_cast<double>(widen(x[label])) : kNan;
  logprobs[i] = static_cast<Real>((chosen - sums.max) / args.temperature - sums.log_sum());
  if (args.with_entropy) entropy[i] = static_cast<Real>(sums.entropy());
  stats[2 * i] = sums.max;
  stats[2 * i + 1] = static_cast<Real>(sums.sum);
}

inline void logprobs_forward(const LogprobsArgs& args, int num_threads) {
  with_dtype(args.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(args.logits.num_rows, args.logits.vocab_size, num_threads,
                 [&](std::int64_t i) { logprobs_row<T>(args, i); });
  });
}

// Two numbers a row, c0 and c1, that turn 2^d_j (softmax.hpp) into the gradient without the label's
// term:
//
//   dL/dx_j = (1/t) [ a (1[j = y] - p_j) - b p_j (log p_j + H) ]
//           = 2^d_j (c0 + c1 d_j) + (a/t) 1[j = y]
//   c0 = -(a + b (H - log sum)) / (t sum)        c1 = -b log(2) / (t sum)
template <typename Real>
struct RowGradient {
  Real max, scale, c0, c1;

  RowGradient(Real max_, Real sum, double a, double b, double entropy, double temperature)
      : max(max_), scale(log2_scale<Real>(temperature)) {
    const double share = -1.0 / (temperature * sum);
    c0 = static_cast<Real>(share * (a + b * (entropy - std::log(static_cast<double>(sum)))));
    c1 = static_cast<Real>(share * b * kLog2);
  }

  // Where p = 0 the gradient is 0.
  PPO_FAST_INLINE Real operator()(Real x) const {
    const Real d = (x - max) * scale;
    return exp2_nonpositive(d) * madd(c1, finite_weight(d), c0);
  }
};

// The backward pass. Bytes moved: the logits once and their gradient once; for a row that is
// masked, or whose a and b are both 0, only the gradient.
template <typename T>
void logprobs_backward_row(const LogprobsBackwardArgs& args, std::int64_t i) {
  using Real = Compute<T>;
  const std::int64_t vocab_size = args.logits.vocab_size, label = args.labels[i];
  T* grad = static_cast<T*>(args.grad_logits) + i * vocab_size;
  const bool masked = args.mask != nullptr && !args.mask[i];
  const auto* grad_logprobs = static_cast<const Real*>(args.grad_logprobs);
  const auto* grad_entropy = static_cast<const Real*>(args.grad_entropy);
  const double a = masked || grad_logprobs == nullptr ? 0.0 : grad_logprobs[i];
  const double b = masked || grad_entropy == nullptr ? 0.0 : grad_entropy[i];
  if (a == 0.0 && b == 0.0) {
    std::memset(grad, 0, static_cast<std::size_t>(vocab_size) * sizeof(T));
    return;
  }
  const T* x = row_start<T>(args.logits, i);
  const auto* stats = static_cast<const Real*>(args.stats) + 2 * i;
  const double entropy = b == 0.0 ? 0.0 : static_cast<const Real*>(args.entropy)[i];
  const RowGradient<Real> gradient(stats[0], stats[1], a, b, entropy, args.temperature);
  for (std::int64_t j = 0; j < vocab_size; ++j) narrow(gradient(widen(x[j])), &grad[j]);
  if (0 <= label && label < vocab_size) {
    const double chosen = gradient(widen(x[label])) + a / args.temperature;
    narrow(static_cast<Real>(chosen), &grad[label]);
  }
}

inline void logprobs_backward(const LogprobsBackwardArgs& args, int num_threads) {
  with_dtype(args.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(args.logits.num_rows, args.logits.vocab_size, num_threads,
                 [&](std::int64_t i) { logprobs_backward_row<T>(args, i); });
  });
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
