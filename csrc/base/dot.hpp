// How stored weights are multiplied with activations. Sums are float (double for double).
#pragma once

#include <type_traits>

#include "base/dtype.hpp"
#include "base/lanes.hpp"

namespace ppo_fast::PPO_FAST_ISA {

// For weights of type W. Activations are converted to `Operand` once, before all products; a step
// loads kStep weights and kStep activations. Activations meet half-precision weights rounded to W,
// as under autocast: whatever the instruction set, the products are of the same numbers.
template <typename W>
struct Dot {
  using Real = Compute<W>;
  using Operand = Real;
  using Vector = Lanes<Real>;
  static constexpr std::int64_t kStep = Lanes<Real>::kWidth;
  // Whether several tiles of rows read weights that were converted before.
  static constexpr bool kWidenFirst = !std::is_same_v<W, Real>;

  PPO_FAST_INLINE static Operand operand(Real x) {
    W rounded;
    narrow(x, &rounded);
    return widen(rounded);
  }
  PPO_FAST_INLINE static Vector operands(const Operand* from) { return Vector::load(from); }
  PPO_FAST_INLINE static Vector weights(const W* from) {
    if constexpr (std::is_same_v<W, Real>) {
      return Vector::load(from);
    } else {
      Real numbers[kStep];
      for (std::int64_t l = 0; l < kStep; ++l) numbers[l] = widen(from[l]);
      return Vector::load(numbers);
    }
  }
  PPO_FAST_INLINE static Lanes<Real> add(const Vector& weights, const Vector& operands,
                                         const Lanes<Real>& sums) {
    return madd(weights, operands, sums);
  }
};

// Activations stay float beside weights in int8; a product is to be multiplied by its output's
// scale.
template <>
struct Dot<Int8> {
  using Real = float;
  using Operand = float;
  using Vector = Lanes<float>;
  static constexpr std::int64_t kStep = Lanes<float>::kWidth;
#if defined(__AVX2__) && defined(__FMA__)
  static constexpr bool kWidenFirst = false;  // two instructions for a vector of weights
#else
  static constexpr bool kWidenFirst = true;
#endif

  PPO_FAST_INLINE static Operand operand(Real x) { return x; }
  PPO_FAST_INLINE static Vector operands(const Operand* from) { return Vector::load(from); }
  PPO_FAST_INLINE static Vector weights(const Int8* from) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    Vector vector;
    vector.numbers = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    return vector;
#elif defined(__AVX2__) && defined(__FMA__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    Vector vector;
    vector.numbers = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    return vector;
#else
    float numbers[kStep];
    for (std::int64_t l = 0; l < kStep; ++l) numbers[l] = widen(from[l]);
    return Vector::load(numbers);
#endif
  }
  PPO_FAST_INLINE static Lanes<Real> add(const Vector& weights, const Vector& operands,
                                         const Lanes<Real>& sums) {
    return madd(weights, operands, sums);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<BFloat16> {
  using Real = float;
  using Operand = BFloat16;
  struct Vector {
    __m512i pairs;
  };
  static constexpr std::int64_t kStep = 32;
  static constexpr bool kWidenFirst = false;

  PPO_FAST_INLINE static Operand operand(Real x) {
    BFloat16 rounded;
    narrow(x, &rounded);
    return rounded;
  }
  PPO_FAST_INLINE static Vector operands(const Operand* from) {
    return {_mm512_loadu_si512(from)};
  }
  PPO_FAST_INLINE static Vector weights(const BFloat16* from) {
    return {_mm512_loadu_si512(from)};
  }
  PPO_FAST_INLINE static Lanes<Real> add(const Vector& weights, const Vector& operands,
                                         const Lanes<Real>& sums) {
    Lanes<Real> result;
    result.numbers =
        _mm512_dpbf16_ps(sums.numbers, (__m512bh)weights.pairs, (__m512bh)operands.pairs);
    return result;
  }
};
#endif

}  // namespace ppo_fast::PPO_FAST_ISA
