// Element types as the bindings name them, and conversions of half precision.
#pragma once

#include <cstdint>

#include "base/math.hpp"

namespace ppo_fast {

// In the order of DTYPE_CODES in ppo_fast/ops/backends/cpp_launch.py.
enum class Dtype : int { float32, float64, bfloat16, float16, int8 };

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};
// A weight as a whole number of its output's scale.
struct Int8 {
  std::int8_t number;
};

namespace PPO_FAST_ISA {

// The type in which arithmetic on T is done.
template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

PPO_FAST_INLINE float widen(float x) { return x; }
PPO_FAST_INLINE double widen(double x) { return x; }
PPO_FAST_INLINE float widen(BFloat16 x) {
  return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
PPO_FAST_INLINE float widen(Float16 x) {
  const std::uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const std::uint32_t sign = (x.bits & 0x8000u) << 16;
  const float normal = bit_cast<float>(magnitude + (112u << 23));
  const float special = bit_cast<float>(magnitude + (224u << 23));  // infinity and NaN
  // Below 2^-14: the bits are a count of 2^-24, added to a number with that last place.
  const float subnormal = bit_cast<float>(magnitude + (113u << 23)) - 6.103515625e-05f;
  const float size =
      magnitude >= 0x0f800000u ? special : (magnitude < 0x00800000u ? subnormal : normal);
  return bit_cast<float>(bit_cast<std::uint32_t>(size) | sign);
}
PPO_FAST_INLINE float widen(Int8 x) { return static_cast<float>(x.number); }

// Rounds to nearest, ties to even.
PPO_FAST_INLINE void narrow(float x, float* to) { *to = x; }
PPO_FAST_INLINE void narrow(double x, double* to) { *to = x; }
PPO_FAST_INLINE void narrow(float x, BFloat16* to) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<std::uint16_t>(x == x ? rounded : 0x7fc0u);
}
PPO_FAST_INLINE void narrow(float x, Float16* to) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: the last place of 0.5 is 2^-24, which is the step of subnormal numbers.
  const std::uint32_t subnormal =
      bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and more
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to->bits = static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// Calls f with a null T*, which tells it the element type.
template <typename F>
void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32:
      return f(static_cast<float*>(nullptr));
    case Dtype::float64:
      return f(static_cast<double*>(nullptr));
    case Dtype::bfloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case Dtype::float16:
      return f(static_cast<Float16*>(nullptr));
    case Dtype::int8:  // of weights alone, which a kernel takes apart
      return;
  }
}

// The same for float32 and float64 alone, where half precision was converted before.
template <typename F>
void with_real(Dtype dtype, F f) {
  dtype == Dtype::float64 ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
