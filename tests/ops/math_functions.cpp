// The functions of csrc/base/math.hpp and csrc/base/dtype.hpp over arrays, for test_math.py.
#include "base/dtype.hpp"

using namespace ppo_fast;
namespace kernels = ppo_fast::PPO_FAST_ISA;

template <typename From, typename To, typename Function>
void over(const From* x, To* y, std::int64_t n, Function function) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = function(x[i]);
}

template <typename Half>
Half narrowed(float x) {
  Half half;
  kernels::narrow(x, &half);
  return half;
}

extern "C" {
void exp2_nonpositive(const float* x, float* y, std::int64_t n) {
  over(x, y, n, [](float v) { return kernels::exp2_nonpositive(v); });
}
void exp_(const float* x, float* y, std::int64_t n) {
  over(x, y, n, [](float v) { return kernels::exp(v); });
}
void expm1_(const float* x, float* y, std::int64_t n) {
  over(x, y, n, [](float v) { return kernels::expm1(v); });
}
void log_(const float* x, float* y, std::int64_t n) {
  over(x, y, n, [](float v) { return kernels::log(v); });
}
void log1p_(const float* x, float* y, std::int64_t n) {
  over(x, y, n, [](float v) { return kernels::log1p(v); });
}
void tanh_(const float* x, float* y, std::int64_t n) {
  over(x, y, n, [](float v) { return kernels::tanh(v); });
}
void widen_bfloat16(const BFloat16* x, float* y, std::int64_t n) {
  over(x, y, n, [](BFloat16 v) { return kernels::widen(v); });
}
void widen_float16(const Float16* x, float* y, std::int64_t n) {
  over(x, y, n, [](Float16 v) { return kernels::widen(v); });
}
void narrow_bfloat16(const float* x, BFloat16* y, std::int64_t n) {
  over(x, y, n, narrowed<BFloat16>);
}
void narrow_float16(const float* x, Float16* y, std::int64_t n) { over(x, y, n, narrowed<Float16>); }
}
