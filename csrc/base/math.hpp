// exp, expm1, log, log1p and tanh: the one definition that every kernel uses. Without branches, so
// that a loop over them becomes vector instructions.
//
// float: polynomials after the argument reduction of Cody and Waite (1980). Largest errors over all
// float32 arguments, in units in the last place of the result: exp2_nonpositive 1.2, exp 1.5,
// expm1 1.8, log 1.1, log1p 1.5, tanh 1.4 (tests/ops/test_math.py checks them). Results below the
// smallest normal number may be 0. NaN gives NaN.
// double: the standard library's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/isa.hpp"

namespace ppo_fast::PPO_FAST_ISA {

template <typename To, typename From>
PPO_FAST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// a * b + c, rounded once where the instruction set can and twice where it cannot.
PPO_FAST_INLINE float madd(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
PPO_FAST_INLINE double madd(double a, double b, double c) { return a * b + c; }

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kExpLowest = -87.3365447f;  // log of the smallest normal number
constexpr float kExpHighest = 88.7228394f;  // log of the largest number
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLog2 = 0.6931471805599453;

// 2^n for -126 <= n <= 127, and 0 for n = -127.
PPO_FAST_INLINE float power_of_two(std::int32_t n) {
  return bit_cast<float>((static_cast<std::uint32_t>(n) + 127u) << 23);
}

// The integer next to x, |x| < 2^22, as a float and as an int.
struct Rounded {
  float value;
  std::int32_t n;
};

PPO_FAST_INLINE Rounded round_to_integer(float x) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: a sum with it has no fraction bits
  const float shifted = x + kRounder;
  const std::uint32_t n = bit_cast<std::uint32_t>(shifted) - bit_cast<std::uint32_t>(kRounder);
  return {shifted - kRounder, static_cast<std::int32_t>(n)};
}

// 2^f - 1 for |f| <= 1/2: the polynomial of the exponentials, exact to 3.3e-8 of the result.
PPO_FAST_INLINE float exp2m1_polynomial(float f) {
  float p = 1.535354822408408e-4f;
  p = madd(p, f, 1.3398833107203245e-3f);
  p = madd(p, f, 9.618435986340046e-3f);
  p = madd(p, f, 5.5503327399492264e-2f);
  p = madd(p, f, 0.24022647738456726f);
  p = madd(p, f, 0.6931471824645996f);
  return p * f;
}

// 2^x for x <= 0, which is all that a softmax needs; 0 below -126.5.
PPO_FAST_INLINE float exp2_nonpositive(float x) {
  const float clamped = x < -127.0f ? -127.0f : x;
  const Rounded rounded = round_to_integer(clamped);
  const float scale = power_of_two(rounded.n);
  return madd(exp2m1_polynomial(clamped - rounded.value), scale, scale);
}
PPO_FAST_INLINE double exp2_nonpositive(double x) { return std::exp2(x); }

// x = n log 2 + r with |r| <= log(2) / 2.
struct Reduced {
  std::int32_t n;
  float r;
};

PPO_FAST_INLINE Reduced reduce_by_log2(float x) {
  const Rounded rounded = round_to_integer(x * static_cast<float>(kLog2E));
  const float n = rounded.value;
  return {rounded.n, madd(n, 2.12194440e-4f, madd(n, -0.693359375f, x))};  // log 2 in two parts
}

PPO_FAST_INLINE float exp(float x) {
  const float above = x < kExpLowest ? kExpLowest : x;
  const Reduced reduced = reduce_by_log2(above > kExpHighest ? kExpHighest : above);
  const std::int32_t half = reduced.n / 2;  // 2^128 is no float: in two factors
  const float scale = power_of_two(half);
  const float f = reduced.r * static_cast<float>(kLog2E);
  const float result = madd(exp2m1_polynomial(f), scale, scale) * power_of_two(reduced.n - half);
  return x < kExpLowest ? 0.0f : (x > kExpHighest ? kInfinity : result);
}
PPO_FAST_INLINE double exp(double x) { return std::exp(x); }

template <typename Real>
struct Exponentials {
  Real exp, expm1;
};

// Both from one polynomial, which is in x and not in x / log 2: near 0 the rounding of x / log 2
// would be as large as k3 = exp(x) - 1 - x itself.
PPO_FAST_INLINE Exponentials<float> exp_and_expm1(float x) {
  constexpr float kHighest = 25.0f;  // above it the 1 is lost in the rounding of exp
  const float above = x < kExpLowest ? kExpLowest : x;
  const Reduced reduced = reduce_by_log2(above > kExpHighest ? kExpHighest : above);
  const float r = reduced.r;
  float p = 1.3926213141530752e-3f;
  p = madd(p, r, 8.363203145563602e-3f);
  p = madd(p, r, 4.1666556149721146e-2f);
  p = madd(p, r, 0.16666576266288757f);
  p = madd(p, r, 0.5f);
  p = madd(r * r, p, r);
  const std::int32_t half = reduced.n / 2;  // 2^128 is no float: in two factors
  const float first = power_of_two(half), second = power_of_two(reduced.n - half);
  const float in_range = madd(p, first, first) * second;
  const float exp = x < kExpLowest ? 0.0f : (x > kExpHighest ? kInfinity : in_range);
  const float scale = first * second;
  return {exp, x > kHighest ? exp : madd(p, scale, scale - 1.0f)};
}
PPO_FAST_INLINE Exponentials<double> exp_and_expm1(double x) {
  return {std::exp(x), std::expm1(x)};
}

template <typename Real>
PPO_FAST_INLINE Real expm1(Real x) {
  return exp_and_expm1(x).expm1;
}

PPO_FAST_INLINE float log(float x) {
  // Subnormal numbers are scaled into the normal range first.
  const bool small = x < std::numeric_limits<float>::min();
  const std::uint32_t bits = bit_cast<std::uint32_t>(small ? x * 8388608.0f : x);  // 2^23
  // x = 2^n (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2); 0x3f3504f3 is sqrt(1/2).
  const std::uint32_t moved = bits - 0x3f3504f3u;
  const std::int32_t n = static_cast<std::int32_t>(moved) >> 23;
  const float f = bit_cast<float>((moved & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float exponent = static_cast<float>(n) - (small ? 23.0f : 0.0f);
  float p = -7.9025998711586e-2f;
  p = madd(p, f, 0.12623994052410126f);
  p = madd(p, f, -0.12998880445957184f);
  p = madd(p, f, 0.14214342832565308f);
  p = madd(p, f, -0.16641218960285187f);
  p = madd(p, f, 0.2000104784965515f);
  p = madd(p, f, -0.25000306963920593f);
  p = madd(p, f, 0.3333333134651184f);
  // log(1 + f) = f - f^2/2 + f^3 p, and n log 2 in two parts, the smallest terms first.
  float tail = madd(f * f * f, p, exponent * -2.12194440e-4f);
  tail = madd(f * f, -0.5f, tail);
  const float result = madd(exponent, 0.693359375f, f + tail);
  return x > 0.0f ? (x < kInfinity ? result : x) : (x == 0.0f ? -kInfinity : kNan);
}
PPO_FAST_INLINE double log(double x) { return std::log(x); }

PPO_FAST_INLINE float log1p(float x) {
  const float u = 1.0f + x;
  // log(u) misses log of (1 + x) / u, which is (x - (u - 1)) / u to rounding.
  const float missing = (x - (u - 1.0f)) / u;
  const float result = log(u) + missing;
  return u == 1.0f ? x : (u > 0.0f && u < kInfinity ? result : log(u));
}
PPO_FAST_INLINE double log1p(double x) { return std::log1p(x); }

PPO_FAST_INLINE float tanh(float x) {
  const float size = x < 0.0f ? -x : x;
  const float square = x * x;
  float p = -6.096299737691879e-3f;
  p = madd(p, square, 2.099689468741417e-2f);
  p = madd(p, square, -5.3850848227739334e-2f);
  p = madd(p, square, 0.1333276927471161f);
  p = madd(p, square, -0.333333283662796f);
  const float near = madd(x * square, p, x);
  const float far = 1.0f - 2.0f / (exp(2.0f * (size > 10.0f ? 10.0f : size)) + 1.0f);
  const float result = size < 0.625f ? near : (x < 0.0f ? -far : far);
  return x == x ? result : x;
}
PPO_FAST_INLINE double tanh(double x) { return std::tanh(x); }

}  // namespace ppo_fast::PPO_FAST_ISA
