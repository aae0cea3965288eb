// A vector that stays in registers between a kernel's steps. A local array of sums that a loop
// updates is in memory instead; where that will do, loops are left to the compiler's vectoriser
// (softmax.hpp).
#pragma once

#include <cstring>

#include "base/math.hpp"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

namespace ppo_fast::PPO_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif

template <typename Real>
struct Lanes {
  static constexpr int kWidth = kVectorBytes / sizeof(Real);
#if defined(__GNUC__) || defined(__clang__)
  typedef Real Vector __attribute__((vector_size(kWidth * sizeof(Real))));
  Vector numbers;
#else
  Real numbers[kWidth];
#endif

  PPO_FAST_INLINE static Lanes load(const Real* from) {
    Lanes lanes;
    std::memcpy(&lanes.numbers, from, sizeof(lanes.numbers));
    return lanes;
  }
};

// a * b + c: rounded once in float where the instruction set can, as madd of math.hpp.
template <typename Real>
PPO_FAST_INLINE Lanes<Real> madd(const Lanes<Real>& a, const Lanes<Real>& b, const Lanes<Real>& c) {
  Lanes<Real> result;
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    result.numbers = _mm512_fmadd_ps(a.numbers, b.numbers, c.numbers);
    return result;
  }
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    result.numbers = _mm256_fmadd_ps(a.numbers, b.numbers, c.numbers);
    return result;
  }
#endif
#if defined(__GNUC__) || defined(__clang__)
  result.numbers = a.numbers * b.numbers + c.numbers;
#else
  for (int l = 0; l < Lanes<Real>::kWidth; ++l) {
    result.numbers[l] = madd(a.numbers[l], b.numbers[l], c.numbers[l]);
  }
#endif
  return result;
}

// The sums of four vectors, each in the same order of additions.
template <typename Real>
PPO_FAST_INLINE void sum_each(const Lanes<Real> (&lanes)[4], Real (&sums)[4]) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    // [a0 + a2, b0 + b2, a1 + a3, b1 + b3], and so on in the upper quarters
    const auto pairs = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    };
    const __m512 ab = pairs(lanes[0].numbers, lanes[1].numbers);
    const __m512 cd = pairs(lanes[2].numbers, lanes[3].numbers);
    const __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)),
                                          _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2)));
    const __m256 halves =
        _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(sums,
                  _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
    return;
  }
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    // [a0 + a2, b0 + b2, a1 + a3, b1 + b3], and so on in the upper half
    const auto pairs = [](__m256 a, __m256 b) {
      return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    };
    const __m256 ab = pairs(lanes[0].numbers, lanes[1].numbers);
    const __m256 cd = pairs(lanes[2].numbers, lanes[3].numbers);
    const __m256 halves = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)),
                                        _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2)));
    _mm_storeu_ps(sums,
                  _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i) {
    Real parts[Lanes<Real>::kWidth];
    std::memcpy(parts, &lanes[i].numbers, sizeof(parts));
    for (int half = Lanes<Real>::kWidth / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) parts[l] += parts[l + half];
    }
    sums[i] = parts[0];
  }
}

}  // namespace ppo_fast::PPO_FAST_ISA
