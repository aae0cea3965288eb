// A transformer layer of the Llama kind: RMS norms before attention and MLP, rotary positions, keys
// and values in a cache, a gated MLP. All of it runs in one parallel region. The tokens are the
// last one of each sequence (a decoding step), or all tokens of some prompts.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "base/dtype.hpp"
#include "base/math.hpp"
#include "kernels/few_row_linear.hpp"

namespace ppo_fast {

// Real is float or double, by `dtype`; the weights of products are Real, or bfloat16 where it is
// float, by `weight_dtype`. All contiguous. N rows (tokens), D hidden size, H heads on K key-value
// heads of size S, I inputs of the last product.
struct DecodeLayerArgs {
  Dtype dtype;
  Dtype weight_dtype;
  std::int64_t num_rows, hidden_size, num_heads, num_kv_heads, head_size, intermediate_size;
  const void *attention_norm, *mlp_norm;                  // [D]
  const void *q_weight, *k_weight, *v_weight, *o_weight;  // [H S, D], [K S, D], [K S, D], [D, H S]
  const void *q_bias, *k_bias, *v_bias, *o_bias;          // or null
  const void *q_norm, *k_norm;                            // [S], or null
  const void *gate_weight, *up_weight, *down_weight;      // [I, D], [I, D], [D, I]
  const void *gate_bias, *up_bias, *down_bias;            // or null
  double attention_eps, mlp_eps, q_eps, k_eps;
  double scaling;         // of q . k
  std::int64_t window;    // how many of the last tokens attention sees; 0: all
  const void* x;          // [N, D]
  const void *cos, *sin;  // [N, S]
  void *keys, *values;    // [slots, capacity, K, S]
  std::int64_t capacity;
  const std::int64_t* slots;    // [N], the slot of a token's sequence
  const std::int64_t* lengths;  // [N], the number of tokens before it there
  void* y;                      // out, [N, D]
  void* scratch;                // Real [N (D + (H + 2 K) S + H S + I)]
};

namespace PPO_FAST_ISA {

// Reduces x with f, from `start` on, in a fixed order.
template <typename Real, typename F>
PPO_FAST_INLINE Real reduce(const Real* x, std::int64_t count, Real start, F f) {
  constexpr int kWidth = 16;
  Real parts[kWidth];
  for (int l = 0; l < kWidth; ++l) parts[l] = start;
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    for (int l = 0; l < kWidth; ++l) parts[l] = f(parts[l], x[i + l]);
  }
  for (; i < count; ++i) parts[0] = f(parts[0], x[i]);
  for (int l = 1; l < kWidth; ++l) parts[0] = f(parts[0], parts[l]);
  return parts[0];
}

// Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4: x / sqrt(mean(x^2) + eps) * weight, as
// activations for weights of type W.
template <typename W, typename Real = Compute<W>>
void rms_norm(const Real* x, const Real* weight, std::int64_t count, double eps, Operand<W>* out) {
  constexpr int kWidth = 16;
  Real sums[kWidth] = {};
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    for (int l = 0; l < kWidth; ++l) sums[l] = madd(x[i + l], x[i + l], sums[l]);
  }
  double sum = 0.0;
  for (int l = 0; l < kWidth; ++l) sum += static_cast<double>(sums[l]);
  for (; i < count; ++i) sum += static_cast<double>(x[i] * x[i]);
  const Real scale = static_cast<Real>(1.0 / std::sqrt(sum / static_cast<double>(count) + eps));
  for (i = 0; i < count; ++i) out[i] = Dot<W>::operand(weight[i] * (x[i] * scale));
}

// Su et al. 2021 (arXiv 2104.09864), in the form that rotates entry i with entry i + S / 2.
template <typename Real>
void rotate(Real* x, const Real* cos, const Real* sin, std::int64_t size) {
  const std::int64_t half = size / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const Real low = x[i], high = x[i + half];
    x[i] = low * cos[i] - high * sin[i];
    x[i + half] = high * cos[i + half] + low * sin[i + half];
  }
}

// One head: out [S] = softmax(scores) v over `count` tokens, `stride` apart; scores [count] are the
// scaled q . k, and are overwritten.
template <typename Real>
void attend(Real* scores, const Real* values, std::int64_t stride, std::int64_t count,
            std::int64_t size, Real* out) {
  const Real max = reduce(scores, count, scores[0], [](Real a, Real b) { return a < b ? b : a; });
  for (std::int64_t j = 0; j < count; ++j) scores[j] = exp(scores[j] - max);
  const Real share = Real(1) / reduce(scores, count, Real(0), [](Real a, Real b) { return a + b; });
  for (std::int64_t i = 0; i < size; ++i) out[i] = Real(0);
  std::int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const Real *v0 = values + j * stride, *v1 = v0 + stride, *v2 = v1 + stride, *v3 = v2 + stride;
    const Real p0 = scores[j], p1 = scores[j + 1], p2 = scores[j + 2], p3 = scores[j + 3];
    for (std::int64_t i = 0; i < size; ++i) {
      out[i] = madd(p3, v3[i], madd(p2, v2[i], madd(p1, v1[i], madd(p0, v0[i], out[i]))));
    }
  }
  for (; j < count; ++j) {
    for (std::int64_t i = 0; i < size; ++i)
      out[i] = madd(scores[j], values[j * stride + i], out[i]);
  }
  for (std::int64_t i = 0; i < size; ++i) out[i] *= share;
}

template <typename W>  // the type of the weights of products
struct DecodeLayer {
  using Real = Compute<W>;
  const DecodeLayerArgs& args;
  const Real* x = static_cast<const Real*>(args.x);
  Real* y = static_cast<Real*>(args.y);
  const std::int64_t n = args.num_rows, hidden = args.hidden_size;
  const std::int64_t size = args.head_size, inner = args.intermediate_size;
  const std::int64_t q_outputs = args.num_heads * size, kv_outputs = args.num_kv_heads * size;
  Real* q = static_cast<Real*>(args.scratch);  // [N, H S]
  Real* k = q + n * q_outputs;                 // [N, K S]
  Real* v = k + n * kv_outputs;                // [N, K S]
  // What products multiply their weights with.
  Operand<W>* normed = reinterpret_cast<Operand<W>*>(v + n * kv_outputs);  // [N, D]
  Operand<W>* attended = normed + n * hidden;                              // [N, H S]
  Operand<W>* gate = attended + n * q_outputs;                             // [N, I]

  static std::int64_t blocks(std::int64_t outputs) {
    return (outputs + kOutputsAtATime - 1) / kOutputsAtATime;
  }

  // Computes block i of `from` [N, inputs] weight^T + bias, plus any `base`, whose rows are `stride`
  // apart, as those of `to`; both start at the block.
  void block_product(std::int64_t i, const Operand<W>* from, const void* weight, const void* bias,
                     std::int64_t inputs, std::int64_t outputs, const Real* base, Real* to,
                     std::int64_t stride) const {
    const std::int64_t first = i * kOutputsAtATime;
    const std::int64_t last = std::min(first + kOutputsAtATime, outputs);
    const Real* shift = bias == nullptr ? nullptr : static_cast<const Real*>(bias) + first;
    products(static_cast<const W*>(weight) + first * inputs, inputs, from, n, inputs, 0,
             last - first, [&](std::int64_t r, std::int64_t o, Real dot) {
               const Real sum = dot + (shift == nullptr ? Real(0) : shift[o]);
               to[r * stride + o] = base == nullptr ? sum : base[r * stride + o] + sum;
             });
  }

  // The same for a block of [N, outputs].
  void product(std::int64_t i, const Operand<W>* from, const void* weight, const void* bias,
               std::int64_t inputs, std::int64_t outputs, const Real* base, Real* to) const {
    const std::int64_t first = i * kOutputsAtATime;
    block_product(i, from, weight, bias, inputs, outputs, base == nullptr ? base : base + first,
                  to + first, outputs);
  }

  void qkv(std::int64_t i) const {
    const std::int64_t q_blocks = blocks(q_outputs), kv_blocks = blocks(kv_outputs);
    if (i < q_blocks) {
      product(i, normed, args.q_weight, args.q_bias, hidden, q_outputs, nullptr, q);
    } else if (i < q_blocks + kv_blocks) {
      product(i - q_blocks, normed, args.k_weight, args.k_bias, hidden, kv_outputs, nullptr, k);
    } else {
      product(i - q_blocks - kv_blocks, normed, args.v_weight, args.v_bias, hidden, kv_outputs,
              nullptr, v);
    }
  }

  // Returns the offset in the cache of a head of a row's sequence.
  std::int64_t in_cache(std::int64_t row, std::int64_t head) const {
    return args.slots[row] * args.capacity * kv_outputs + head * size;
  }

  // Rotates a row's queries and keys by its position, and copies its keys and values to the cache.
  void place(std::int64_t row) const {
    const Real* cos = static_cast<const Real*>(args.cos) + row * size;
    const Real* sin = static_cast<const Real*>(args.sin) + row * size;
    const auto turn = [&](Real* x, const void* norm, double eps) {
      if (norm != nullptr) rms_norm<Real>(x, static_cast<const Real*>(norm), size, eps, x);
      rotate(x, cos, sin, size);
    };
    for (std::int64_t h = 0; h < args.num_heads; ++h) {
      turn(q + row * q_outputs + h * size, args.q_norm, args.q_eps);
    }
    Real *key = k + row * kv_outputs, *value = v + row * kv_outputs;
    for (std::int64_t h = 0; h < args.num_kv_heads; ++h)
      turn(key + h * size, args.k_norm, args.k_eps);
    const std::int64_t cell = in_cache(row, 0) + args.lengths[row] * kv_outputs;
    std::copy_n(key, kv_outputs, static_cast<Real*>(args.keys) + cell);
    std::copy_n(value, kv_outputs, static_cast<Real*>(args.values) + cell);
  }

  // Attention of the query heads that share one key-value head of one row.
  void attention(std::int64_t i) const {
    const std::int64_t row = i / args.num_kv_heads, head = i % args.num_kv_heads;
    const std::int64_t group = args.num_heads / args.num_kv_heads;
    const std::int64_t stride = kv_outputs, length = args.lengths[row];
    const Real* keys = static_cast<const Real*>(args.keys) + in_cache(row, head);
    const Real* values = static_cast<const Real*>(args.values) + in_cache(row, head);
    const Real* queries = q + row * q_outputs + head * group * size;
    const std::int64_t first =
        args.window > 0 ? std::max<std::int64_t>(length + 1 - args.window, 0) : 0;
    const std::int64_t count = length + 1 - first;
    static thread_local std::vector<Real> scores;
    scores.resize(static_cast<std::size_t>(group * count + size));
    Real *to = scores.data(), *out = to + group * count;
    const Real scaling = static_cast<Real>(args.scaling);
    products(keys + first * stride, stride, queries, group, size, 0, count,
             [=](std::int64_t g, std::int64_t j, Real dot) { to[g * count + j] = dot * scaling; });
    for (std::int64_t g = 0; g < group; ++g) {
      attend(to + g * count, values + first * stride, stride, count, size, out);
      Operand<W>* of_head = attended + row * q_outputs + (head * group + g) * size;
      for (std::int64_t j = 0; j < size; ++j) of_head[j] = Dot<W>::operand(out[j]);
    }
  }

  // Computes block i of gate = silu(gate) * up.
  void gated(std::int64_t i) const {
    static thread_local std::vector<Real> room;
    room.resize(static_cast<std::size_t>(2 * n * kOutputsAtATime));
    Real *gates = room.data(), *ups = gates + n * kOutputsAtATime;
    const auto block = [&](const void* weight, const void* bias, Real* to) {
      block_product(i, normed, weight, bias, hidden, inner, nullptr, to, kOutputsAtATime);
    };
    block(args.gate_weight, args.gate_bias, gates);
    block(args.up_weight, args.up_bias, ups);
    const std::int64_t first = i * kOutputsAtATime;
    const std::int64_t count = std::min(kOutputsAtATime, inner - first);
    for (std::int64_t r = 0; r < n; ++r) {
      const Real *g = gates + r * kOutputsAtATime, *u = ups + r * kOutputsAtATime;
      Operand<W>* to = gate + r * inner + first;
      for (std::int64_t j = 0; j < count; ++j) {
        to[j] = Dot<W>::operand(g[j] / (Real(1) + exp(-g[j])) * u[j]);
      }
    }
  }

  void run(int num_threads) const {
    const auto norm = [this](const Real* from, const void* weight, double eps) {
      return Loop{n, 1, [=](std::int64_t r) {
                    const std::int64_t row = r * hidden;
                    rms_norm<W>(from + row, static_cast<const Real*>(weight), hidden, eps,
                                normed + row);
                  }};
    };
    const auto out = [this](std::int64_t i) {
      product(i, attended, args.o_weight, args.o_bias, q_outputs, hidden, x, y);
    };
    const auto down = [this](std::int64_t i) {
      product(i, gate, args.down_weight, args.down_bias, inner, hidden, y, y);
    };
    const std::int64_t weights = hidden * (2 * q_outputs + 2 * kv_outputs + 3 * inner);
    run_loops(
        useful_threads(product_cost(weights, n), num_threads),
        norm(x, args.attention_norm, args.attention_eps),
        Loop{blocks(q_outputs) + 2 * blocks(kv_outputs), 1, [this](std::int64_t i) { qkv(i); }},
        Loop{n, 1, [this](std::int64_t r) { place(r); }},
        Loop{n * args.num_kv_heads, 1, [this](std::int64_t i) { attention(i); }},
        Loop{blocks(hidden), 1, out}, norm(y, args.mlp_norm, args.mlp_eps),
        Loop{blocks(inner), 1, [this](std::int64_t i) { gated(i); }},
        Loop{blocks(hidden), 1, down});
  }
};

inline void decode_layer(const DecodeLayerArgs& args, int num_threads) {
  if (args.weight_dtype == Dtype::bfloat16) return DecodeLayer<BFloat16>{args}.run(num_threads);
  with_real(args.dtype, [&](auto* type) {
    DecodeLayer<std::remove_pointer_t<decltype(type)>>{args}.run(num_threads);
  });
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
