// Philox4x32-10: random words that are a function of a counter and a key, and of nothing else.
#pragma once

#include <cstdint>

#include "base/isa.hpp"

namespace ppo_fast::PPO_FAST_ISA {

// Counters whose words are computed together.
constexpr std::int64_t kCounters = 32;

// The words of kCounters consecutive counters: word l of the i-th of them is lanes[l][i].
struct alignas(64) PhiloxWords {
  std::uint32_t lanes[4][kCounters];
};

// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3; multipliers and
// key increments as in their Random123. Counter i is (first + i, position, 0, 0).
inline void philox4x32(std::uint32_t first, std::uint32_t position, std::uint64_t key,
                       PhiloxWords* words) {
  constexpr std::uint64_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr std::uint32_t kKeyStep0 = 0x9E3779B9u, kKeyStep1 = 0xBB67AE85u;
  const std::uint32_t key_0 = static_cast<std::uint32_t>(key);
  const std::uint32_t key_1 = static_cast<std::uint32_t>(key >> 32);
  // A round waits for the one before it; meanwhile the other half of the counters is computed.
  // Vectors hold four counters: in wider ones GCC's shuffles around the products cross the 128-bit
  // halves.
  constexpr int kHalves = 2;
  constexpr std::int64_t kHalf = kCounters / kHalves;
#if defined(__GNUC__) || defined(__clang__)
#pragma omp simd simdlen(4)
#endif
  for (std::int64_t i = 0; i < kHalf; ++i) {
    std::uint32_t c0[kHalves], c1[kHalves], c2[kHalves], c3[kHalves];
    for (int h = 0; h < kHalves; ++h) {
      c0[h] = first + static_cast<std::uint32_t>(h * kHalf + i);
      c1[h] = position;
      c2[h] = c3[h] = 0;
    }
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 10
#endif
    for (std::uint32_t round = 0; round < 10; ++round) {
      for (int h = 0; h < kHalves; ++h) {
        const std::uint64_t product_0 = kMultiplier0 * c0[h], product_1 = kMultiplier1 * c2[h];
        c0[h] = static_cast<std::uint32_t>(product_1 >> 32) ^ c1[h] ^ (key_0 + round * kKeyStep0);
        c1[h] = static_cast<std::uint32_t>(product_1);
        c2[h] = static_cast<std::uint32_t>(product_0 >> 32) ^ c3[h] ^ (key_1 + round * kKeyStep1);
        c3[h] = static_cast<std::uint32_t>(product_0);
      }
    }
    for (int h = 0; h < kHalves; ++h) {
      words->lanes[0][h * kHalf + i] = c0[h];
      words->lanes[1][h * kHalf + i] = c1[h];
      words->lanes[2][h * kHalf + i] = c2[h];
      words->lanes[3][h * kHalf + i] = c3[h];
    }
  }
}

}  // namespace ppo_fast::PPO_FAST_ISA
