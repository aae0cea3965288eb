// Weights in int8, with a scale for each row: weight = number * scale.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "base/dtype.hpp"
#include "base/math.hpp"
#include "base/parallel.hpp"

namespace ppo_fast {

// V rows (outputs) of D inputs. The weight is float, bfloat16 or float16, and of any strides; what
// is written is contiguous.
struct QuantizeRowsArgs {
  Dtype dtype;
  const void* weight;         // [V, D]
  std::int8_t* numbers;       // out, [V, D]
  float* scales;              // out, [V]
  std::int64_t num_rows;      // V
  std::int64_t num_inputs;    // D
  std::int64_t row_stride;    // in elements
  std::int64_t input_stride;  // in elements
};

namespace PPO_FAST_ISA {

// Rows that a thread takes at a time: of a weight stored [D, V], a cache line has as many.
constexpr std::int64_t kQuantizedAtATime = 16;
// Rows of numbers that are all smaller are 0: 127 / number would be infinite.
constexpr float kLeastSize = 1e-30f;

// Writes the nearest whole numbers (ties to even) of x / scale, and returns the scale, which is
// max |x| / 127; NaN or infinity where x has such.
PPO_FAST_INLINE float quantize_row(const float* x, std::int64_t count, std::int8_t* to) {
  std::int32_t most = 0;  // of the bits, which are in the order of the sizes; NaN's are the highest
  for (std::int64_t k = 0; k < count; ++k) {
    most = std::max(most, bit_cast<std::int32_t>(x[k]) & 0x7fffffff);
  }
  const float size = bit_cast<float>(most);
  const bool usable = size >= kLeastSize && size <= std::numeric_limits<float>::max();
  const float factor = usable ? 127.0f / size : 0.0f;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23, whose last place is 1
  for (std::int64_t k = 0; k < count; ++k) {
    const std::int32_t bits = bit_cast<std::int32_t>(x[k] * factor + kShift);
    to[k] = static_cast<std::int8_t>(bits - bit_cast<std::int32_t>(kShift));
  }
  return size < kLeastSize ? 0.0f : size / 127.0f;
}

template <typename T>
void quantize(const QuantizeRowsArgs& args, int num_threads) {
  const std::int64_t count = args.num_inputs;
  const std::int64_t blocks = (args.num_rows + kQuantizedAtATime - 1) / kQuantizedAtATime;
  parallel_for(blocks, kQuantizedAtATime * count / 2, num_threads, [&](std::int64_t i) {
    const std::int64_t first = i * kQuantizedAtATime;
    const std::int64_t rows = std::min(kQuantizedAtATime, args.num_rows - first);
    const T* from = static_cast<const T*>(args.weight) + first * args.row_stride;
    const bool in_place = std::is_same_v<T, float> && args.input_stride == 1;
    static thread_local std::vector<float> room;
    if (!in_place) {
      room.resize(static_cast<std::size_t>(kQuantizedAtATime * count));
      for (std::int64_t k = 0; k < count; ++k) {
        for (std::int64_t r = 0; r < rows; ++r) {
          room[r * count + k] = widen(from[r * args.row_stride + k * args.input_stride]);
        }
      }
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const float* x = room.data() + r * count;
      if constexpr (std::is_same_v<T, float>) {
        if (in_place) x = from + r * args.row_stride;
      }
      const std::int64_t row = first + r;
      args.scales[row] = quantize_row(x, count, args.numbers + row * count);
    }
  });
}

inline void quantize_rows(const QuantizeRowsArgs& args, int num_threads) {
  switch (args.dtype) {
    case Dtype::bfloat16:
      return quantize<BFloat16>(args, num_threads);
    case Dtype::float16:
      return quantize<Float16>(args, num_threads);
    default:
      return quantize<float>(args, num_threads);
  }
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
