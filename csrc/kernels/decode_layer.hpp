// A transformer layer: norms before attention and MLP, and after them where it has such, keys and
// values in a cache, an MLP with or without a gate. Llama's, Gemma's and GPT-2's layers are of this
// form. All of it runs in one parallel region. The tokens are the last one of each sequence (a
// decoding step), or all tokens of some prompts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "base/dtype.hpp"
#include "base/math.hpp"
#include "kernels/column_products.hpp"
#include "kernels/few_row_linear.hpp"
#include "kernels/layer_parts.hpp"

namespace ppo_fast {

// In the order of ACTIVATIONS in ppo_fast/rollout/speedups/fused_layers.py.
enum class Activation : int { silu, gelu_tanh };

// The weight of a product; its rows are `stride` elements apart. In int8, each output has a scale.
struct Matrix {
  const void* data;
  std::int64_t stride;
  const float* scales;  // [outputs], or null
};

// Real is float or double, by `dtype`; the weights of products are Real, or bfloat16 or int8 where
// it is float, by `weight_dtype`. All contiguous, but for the rows of matrices. N rows (tokens), D
// hidden size, H heads on K key-value heads of size S, I inputs of the last product. Matrices are
// given as [outputs, inputs]; with inputs_first, they are stored [inputs, outputs].
struct DecodeLayerArgs {
  Dtype dtype;
  Dtype weight_dtype;
  std::int64_t num_rows, hidden_size, num_heads, num_kv_heads, head_size, intermediate_size;
  bool inputs_first;
  bool layer_norm;  // norms subtract the mean, and may have biases; else they are RMS norms
  Activation activation;
  const void *attention_norm, *mlp_norm;            // [D]
  const void *attention_norm_bias, *mlp_norm_bias;  // [D], or null
  const void *attention_out_norm, *mlp_out_norm;    // [D], of what is added to x, or null
  Matrix q_weight, k_weight, v_weight, o_weight;    // [H S, D], [K S, D], [K S, D], [D, H S]
  const void *q_bias, *k_bias, *v_bias, *o_bias;    // or null
  const void *q_norm, *k_norm;                      // [S], or null
  Matrix gate_weight, up_weight, down_weight;       // [I, D], [I, D], [D, I]; no up: no gating
  const void *gate_bias, *up_bias, *down_bias;      // or null
  double attention_eps, mlp_eps, attention_out_eps, mlp_out_eps, q_eps, k_eps;
  double scaling;         // of q . k
  double softcap;         // c of scores c tanh(scores / c); 0: none
  std::int64_t window;    // how many of the last tokens attention sees; 0: all
  const void* x;          // [N, D]
  const void *cos, *sin;  // [N, S], or null: no rotation
  Dtype cache_dtype;      // of keys and values: Real, or bfloat16 where that is float
  void *keys, *values;    // [slots, capacity, K, S]
  std::int64_t capacity;
  const std::int64_t* slots;    // [N], the slot of a token's sequence
  const std::int64_t* lengths;  // [N], the number of tokens before it there
  void* y;                      // out, [N, D]
  void* scratch;                // Real [N (2 D + (H + 2 K) S + H S + I)]
};

namespace PPO_FAST_ISA {

template <typename W>  // the type of the weights of products
struct DecodeLayer {
  using Real = Compute<W>;
  const DecodeLayerArgs& args;
  const int threads;
  const Real* x = static_cast<const Real*>(args.x);
  Real* y = static_cast<Real*>(args.y);
  const std::int64_t n = args.num_rows, hidden = args.hidden_size;
  const std::int64_t size = args.head_size, inner = args.intermediate_size;
  const std::int64_t q_outputs = args.num_heads * size, kv_outputs = args.num_kv_heads * size;
  Real* q = static_cast<Real*>(args.scratch);  // [N, H S]
  Real* k = q + n * q_outputs;                 // [N, K S]
  Real* v = k + n * kv_outputs;                // [N, K S]
  Real* added = v + n * kv_outputs;            // [N, D], before a norm of its own
  // What products multiply their weights with.
  Operand<W>* normed = reinterpret_cast<Operand<W>*>(added + n * hidden);  // [N, D]
  Operand<W>* attended = normed + n * hidden;                              // [N, H S]
  Operand<W>* gate = attended + n * q_outputs;                             // [N, I]

  // Returns how many of a product's outputs a thread computes at a time, a block.
  std::int64_t at_a_time(std::int64_t outputs) const {
    return args.inputs_first ? columns_at_a_time(outputs, threads) : kOutputsAtATime;
  }
  std::int64_t blocks(std::int64_t outputs) const {
    return (outputs + at_a_time(outputs) - 1) / at_a_time(outputs);
  }

  // Computes block i of `from` [N, inputs] weight^T + bias, plus any `base`, whose rows are
  // `stride` apart, as those of `to`; both start at the block.
  void block_product(std::int64_t i, const Operand<W>* from, const Matrix& weight, const void* bias,
                     std::int64_t inputs, std::int64_t outputs, const Real* base, Real* to,
                     std::int64_t stride) const {
    const std::int64_t first = i * at_a_time(outputs);
    const std::int64_t count = std::min(at_a_time(outputs), outputs - first);
    const Real* shift = bias == nullptr ? nullptr : static_cast<const Real*>(bias) + first;
    const float* scales = weight.scales == nullptr ? nullptr : weight.scales + first;
    const auto emit = [&](std::int64_t r, std::int64_t o, Real dot) {
      const Real sum = scaled<W>(dot, scales, o) + (shift == nullptr ? Real(0) : shift[o]);
      to[r * stride + o] = base == nullptr ? sum : base[r * stride + o] + sum;
    };
    const W* data = static_cast<const W*>(weight.data);
    if (args.inputs_first) {
      column_products(data + first, weight.stride, from, n, inputs, count, emit);
    } else {
      products(data + first * weight.stride, weight.stride, from, n, inputs, 0, count, emit);
    }
  }

  // The same for a block of [N, outputs].
  void product(std::int64_t i, const Operand<W>* from, const Matrix& weight, const void* bias,
               std::int64_t inputs, std::int64_t outputs, const Real* base, Real* to) const {
    const std::int64_t first = i * at_a_time(outputs);
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

  // Calls f with a null pointer to the type of the cache's numbers.
  template <typename F>
  void with_cached(F f) const {
    if constexpr (std::is_same_v<Real, float>) {
      if (args.cache_dtype == Dtype::bfloat16) return f(static_cast<CachedBFloat16*>(nullptr));
    }
    f(static_cast<Real*>(nullptr));
  }

  // Rotates a row's queries and keys by its position, where the layer rotates, and writes its keys
  // and values to the cache.
  void place(std::int64_t row) const {
    const auto turn = [&](Real* x, const void* norm, double eps) {
      if (norm != nullptr) rms_norm<Real>(x, static_cast<const Real*>(norm), size, eps, x);
      if (args.cos == nullptr) return;
      rotate(x, static_cast<const Real*>(args.cos) + row * size,
             static_cast<const Real*>(args.sin) + row * size, size);
    };
    for (std::int64_t h = 0; h < args.num_heads; ++h) {
      turn(q + row * q_outputs + h * size, args.q_norm, args.q_eps);
    }
    Real *key = k + row * kv_outputs, *value = v + row * kv_outputs;
    for (std::int64_t h = 0; h < args.num_kv_heads; ++h)
      turn(key + h * size, args.k_norm, args.k_eps);
    with_cached([&](auto* type) {
      using Cached = std::remove_pointer_t<decltype(type)>;
      const std::int64_t cell = in_cache(row, 0) + args.lengths[row] * kv_outputs;
      Cached* keys = static_cast<Cached*>(args.keys) + cell;
      Cached* values = static_cast<Cached*>(args.values) + cell;
      for (std::int64_t i = 0; i < kv_outputs; ++i) {
        narrow(key[i], keys + i);
        narrow(value[i], values + i);
      }
    });
  }

  // Attention of the query heads that share one key-value head of one row.
  template <typename Cached>
  void attention(std::int64_t i) const {
    const std::int64_t row = i / args.num_kv_heads, head = i % args.num_kv_heads;
    const std::int64_t group = args.num_heads / args.num_kv_heads;
    const std::int64_t stride = kv_outputs, length = args.lengths[row];
    const Cached* keys = static_cast<const Cached*>(args.keys) + in_cache(row, head);
    const Cached* values = static_cast<const Cached*>(args.values) + in_cache(row, head);
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
    if (args.softcap > 0.0) {
      const Real cap = static_cast<Real>(args.softcap);
      for (std::int64_t j = 0; j < group * count; ++j) to[j] = cap * tanh(to[j] / cap);
    }
    for (std::int64_t g = 0; g < group; ++g) {
      attend(to + g * count, values + first * stride, stride, count, size, out);
      Operand<W>* of_head = attended + row * q_outputs + (head * group + g) * size;
      for (std::int64_t j = 0; j < size; ++j) of_head[j] = Dot<W>::operand(out[j]);
    }
  }

  // Computes block i of gate = activation(gate), times up if there is one.
  void activated(std::int64_t i) const {
    const std::int64_t width = at_a_time(inner), first = i * width;
    const std::int64_t count = std::min(width, inner - first);
    static thread_local std::vector<Real> room;
    room.resize(static_cast<std::size_t>(2 * n * width));
    Real *gates = room.data(), *ups = gates + n * width;
    const auto block = [&](const Matrix& weight, const void* bias, Real* to) {
      block_product(i, normed, weight, bias, hidden, inner, nullptr, to, width);
    };
    const bool gated = args.up_weight.data != nullptr;
    block(args.gate_weight, args.gate_bias, gates);
    if (gated) block(args.up_weight, args.up_bias, ups);
    const auto apply = [&](auto activation) {
      for (std::int64_t r = 0; r < n; ++r) {
        const Real *g = gates + r * width, *u = ups + r * width;
        Operand<W>* to = gate + r * inner + first;
        if (gated) {
          for (std::int64_t j = 0; j < count; ++j) to[j] = Dot<W>::operand(activation(g[j]) * u[j]);
        } else {
          for (std::int64_t j = 0; j < count; ++j) to[j] = Dot<W>::operand(activation(g[j]));
        }
      }
    };
    switch (args.activation) {
      case Activation::silu:
        return apply([](Real a) { return silu(a); });
      case Activation::gelu_tanh:
        return apply([](Real a) { return gelu_tanh(a); });
    }
  }

  // Normalises row r of `from` [N, D] for the next products.
  void norm(std::int64_t r, const Real* from, const void* weight, const void* bias,
            double eps) const {
    const Real* scale = static_cast<const Real*>(weight);
    if (args.layer_norm) {
      layer_norm<W>(from + r * hidden, scale, static_cast<const Real*>(bias), hidden, eps,
                    normed + r * hidden);
    } else {
      rms_norm<W>(from + r * hidden, scale, hidden, eps, normed + r * hidden);
    }
  }

  // Computes row r of y = base + norm(added).
  void add_normed(std::int64_t r, const Real* base, const void* weight, double eps) const {
    Real* row = added + r * hidden;
    rms_norm<Real>(row, static_cast<const Real*>(weight), hidden, eps, row);
    for (std::int64_t i = 0; i < hidden; ++i) y[r * hidden + i] = base[r * hidden + i] + row[i];
  }

  void run() const {
    // What a norm of its own follows is not added to x, or to y, at once.
    const bool out_norm = args.attention_out_norm != nullptr;
    const bool mlp_out_norm = args.mlp_out_norm != nullptr;
    const auto first_norm = [this](std::int64_t r) {
      norm(r, x, args.attention_norm, args.attention_norm_bias, args.attention_eps);
    };
    const auto out = [this, out_norm](std::int64_t i) {
      product(i, attended, args.o_weight, args.o_bias, q_outputs, hidden, out_norm ? nullptr : x,
              out_norm ? added : y);
    };
    const auto second_norm = [this, out_norm](std::int64_t r) {
      if (out_norm) add_normed(r, x, args.attention_out_norm, args.attention_out_eps);
      norm(r, y, args.mlp_norm, args.mlp_norm_bias, args.mlp_eps);
    };
    const auto down = [this, mlp_out_norm](std::int64_t i) {
      product(i, gate, args.down_weight, args.down_bias, inner, hidden, mlp_out_norm ? nullptr : y,
              mlp_out_norm ? added : y);
    };
    const auto attend_heads = [this](std::int64_t i) {
      with_cached([&](auto* type) { attention<std::remove_pointer_t<decltype(type)>>(i); });
    };
    const auto last_norm = [this](std::int64_t r) {
      add_normed(r, y, args.mlp_out_norm, args.mlp_out_eps);
    };
    run_loops(threads, Loop{n, 1, first_norm},
              Loop{blocks(q_outputs) + 2 * blocks(kv_outputs), kShare,
                   [this](std::int64_t i) { qkv(i); }},
              Loop{n, 1, [this](std::int64_t r) { place(r); }},
              Loop{n * args.num_kv_heads, 1, attend_heads}, Loop{blocks(hidden), kShare, out},
              Loop{n, 1, second_norm},
              Loop{blocks(inner), kShare, [this](std::int64_t i) { activated(i); }},
              Loop{blocks(hidden), kShare, down}, Loop{mlp_out_norm ? n : 0, 1, last_norm});
  }
};

template <typename W>
void run_decode_layer(const DecodeLayerArgs& args, int num_threads) {
  const std::int64_t heads = 2 * (args.num_heads + args.num_kv_heads) * args.head_size;
  const std::int64_t inner = (args.up_weight.data == nullptr ? 2 : 3) * args.intermediate_size;
  const std::int64_t cost = product_cost(args.hidden_size * (heads + inner), args.num_rows);
  DecodeLayer<W>{args, useful_threads(cost, num_threads)}.run();
}

inline void decode_layer(const DecodeLayerArgs& args, int num_threads) {
  if (args.weight_dtype == Dtype::bfloat16) return run_decode_layer<BFloat16>(args, num_threads);
  if (args.weight_dtype == Dtype::int8) return run_decode_layer<Int8>(args, num_threads);
  with_real(args.dtype, [&](auto* type) {
    run_decode_layer<std::remove_pointer_t<decltype(type)>>(args, num_threads);
  });
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
