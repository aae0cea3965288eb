// kernels.cpp is compiled once for each instruction set, with PPO_FAST_ISA naming the namespace of
// that copy. Elsewhere the headers are included for their argument structs alone.
#pragma once

#ifndef PPO_FAST_ISA
#define PPO_FAST_ISA declarations
#endif

// A call that is not inlined keeps the compiler from vectorising the loop around it.
#if defined(__GNUC__) || defined(__clang__)
#define PPO_FAST_INLINE inline __attribute__((always_inline))
#else
#define PPO_FAST_INLINE inline
#endif

namespace ppo_fast::PPO_FAST_ISA {

// Asks for the memory at `address`, which may be any; it comes while the processor goes on.
PPO_FAST_INLINE void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address);
#endif
}

// The same, as far as the second-level cache: more of such requests are on their way at once than of
// those to the first level, of which a core has few.
PPO_FAST_INLINE void prefetch_to_l2([[maybe_unused]] const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address, 0, 2);
#endif
}

}  // namespace ppo_fast::PPO_FAST_ISA
