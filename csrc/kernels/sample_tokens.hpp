// Gumbel-max draws of a token a row, with optional truncation to the likeliest tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "base/dtype.hpp"
#include "base/math.hpp"
#include "base/parallel.hpp"
#include "base/philox.hpp"
#include "base/softmax.hpp"

namespace ppo_fast {

// N rows of V logits. Real is float, and double for float64 logits.
struct SampleTokensArgs {
  Dtype dtype;
  const void* logits;       // [N, V] with V contiguous
  std::int64_t row_stride;  // of the logits, in elements
  std::int64_t num_rows;
  std::int64_t vocab_size;
  const std::int64_t* seeds;      // [N]
  const std::int64_t* positions;  // [N]
  double temperature;
  std::int64_t top_k;       // 0: off
  double top_p;             // 1: off
  std::int64_t* tokens;     // out, [N]
  void* logprobs;           // out, Real [N]
  void* sampling_logprobs;  // out, Real [N]
};

namespace PPO_FAST_ISA {

// Tokens that share one call of the generator, and one bound.
constexpr std::int64_t kBlock = 4 * kCounters;
static_assert(kChunk % kBlock == 0 && kBlock % kLanes == 0);

// v = min(float(max(word, 1)) * 2^-32, 1 - 2^-24). The conversion is in two halves, since AVX2 has
// none of unsigned integers: both are exact, and their sum is rounded once, to nearest even.
PPO_FAST_INLINE float uniform(std::uint32_t word) {
  const std::uint32_t r = word > 1u ? word : 1u;
  const float high = static_cast<float>(static_cast<std::int32_t>(r >> 16)) * 65536.0f;
  const float v = (high + static_cast<float>(static_cast<std::int32_t>(r & 0xffffu))) * 0x1p-32f;
  return v < 1.0f - 0x1p-24f ? v : 1.0f - 0x1p-24f;
}

PPO_FAST_INLINE float gumbel_noise(std::uint32_t word) { return -log(-log1p(-uniform(word))); }

// Returns an upper bound of the noise of `word` and of any larger word, at most 0.06 too high where
// that matters. -log1p(-v) >= v, and log2(v) = log2(2^n (1 + f)) >= n + f, which the bits of v as
// an integer give. The margin is above all rounding errors; the largest is an ulp of 22.2 (2e-6).
PPO_FAST_INLINE float noise_bound(std::uint32_t word) {
  constexpr float kMargin = 2e-5f;
  const float bits = static_cast<float>(bit_cast<std::int32_t>(uniform(word)));
  return kMargin - static_cast<float>(kLog2) * (bits * 0x1p-23f - 127.0f);
}
constexpr float kLargestNoise = 22.1808f;  // above 32 log 2

PPO_FAST_INLINE std::uint32_t smallest(const PhiloxWords& words) {
  std::uint32_t least = 0xffffffffu;
  for (int lane = 0; lane < 4; ++lane) {
    for (std::int64_t i = 0; i < kCounters; ++i) least = std::min(least, words.lanes[lane][i]);
  }
  return least;
}

template <typename Real>
PPO_FAST_INLINE Real largest_of_block(const Real* x, std::int64_t count) {
  Real tops[kLanes];
  for (std::int64_t k = 0; k < kLanes; ++k) tops[k] = x[k];
  for (std::int64_t j = kLanes; j < count; j += kLanes) {
    for (std::int64_t k = 0; k < kLanes; ++k) tops[k] = tops[k] < x[j + k] ? x[j + k] : tops[k];
  }
  for (std::int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::int64_t k = 0; k < width; ++k) {
      tops[k] = tops[k] < tops[k + width] ? tops[k + width] : tops[k];
    }
  }
  return tops[0];
}

// A token, its z = x / t, and exp(z - max z).
template <typename Real>
struct Candidate {
  Real z;
  Real mass;
  std::int64_t id;
};

// Likelier tokens first, of equals the smaller id.
template <typename Real>
bool ranks_before(const Candidate<Real>& a, const Candidate<Real>& b) {
  return a.z > b.z || (a.z == b.z && a.id < b.id);
}

template <typename Real>
double mass_of(const Candidate<Real>* candidates, std::int64_t count) {
  double mass = 0.0;
  for (std::int64_t j = 0; j < count; ++j) mass += candidates[j].mass;
  return mass;
}

// Returns the smallest n >= 1 such that the n candidates that rank first have a mass of `target` or
// more together (all of them if none has), and moves these to the front, the last of them to n - 1.
// Quickselect: each turn settles one half and goes on with the other.
template <typename Real>
std::int64_t select_mass(Candidate<Real>* candidates, std::int64_t count, double target) {
  std::int64_t first = 0, last = count;  // n - 1 is in [first, last)
  double before = 0.0;                   // mass of [0, first)
  while (last - first > 1) {
    const std::int64_t middle = first + (last - first) / 2;
    std::nth_element(candidates + first, candidates + middle, candidates + last,
                     ranks_before<Real>);
    const double through = before + mass_of(candidates + first, middle - first);
    if (through >= target) {
      last = middle;
    } else {
      first = middle;
      before = through;
    }
  }
  return first + 1;
}

// The tokens kept: those that rank up to `last_z`, `last_id`. `mass` is their total.
template <typename Real>
struct Truncation {
  Real last_z;
  std::int64_t last_id;
  double mass;

  bool keeps(Real z, std::int64_t id) const { return z > last_z || (z == last_z && id <= last_id); }
};

// A thread's memory, used by one row after another.
template <typename Real>
struct SampleRoom {
  std::vector<Real> tops;    // largest z of each block
  std::vector<Real> ranked;  // a copy of them, to select from
  std::vector<Candidate<Real>> candidates;
};

// Draws one token from a row of logits x: with t the temperature, z = x / t and g the noise of
// (seed, position, token id) that ppo_fast/ops/sample_tokens/api.py defines,
//
//   token = argmax_j (z_j + g_j)        (Gumbel-max: Maddison et al. 2014, arXiv 1411.0030, sec. 2)
//
// over all tokens or those that top_k and top_p keep. Bytes moved: the logits once; if a row does
// not stay in the cache, again the blocks of kBlock tokens that no bound rules out.
template <typename T>
struct SampleRow {
  using Real = Compute<T>;
  static constexpr Real kNothing = -std::numeric_limits<Real>::infinity();

  const T* x;
  std::int64_t vocab_size;
  Real temperature, scale;  // t, and log2(e) / t
  std::uint64_t seed;
  std::uint32_t position;
  SampleRoom<Real>* room;
  SoftmaxSums<Real> sums = {};

  std::int64_t num_blocks() const { return static_cast<std::int64_t>(room->tops.size()); }

  // Passes over the row: softmax statistics, and the largest z of each block.
  void scan() {
    room->tops.clear();
    Chunk<Real> chunk_room;
    for (std::int64_t start = 0; start < vocab_size; start += kChunk) {
      const std::int64_t count = std::min(kChunk, vocab_size - start), padded = round_up(count);
      const Real* chunk = load_chunk(x + start, count, &chunk_room);
      sums.template fold<false>(chunk, padded, scale);
      for (std::int64_t j = 0; j < padded; j += kBlock) {
        const Real top = largest_of_block(chunk + j, std::min(kBlock, padded - j));
        room->tops.push_back(top / temperature);
      }
    }
  }

  // Whether the row holds neither NaN nor +inf, and not only -inf.
  bool has_distribution() const {
    return std::isfinite(sums.max / temperature) && std::isfinite(sums.sum);
  }

  // Keeps the first top_k tokens by rank, and of these the first that have top_p of their mass.
  Truncation<Real> truncate(std::int64_t top_k, double top_p) {
    if (top_k == 0 || top_k > vocab_size) top_k = vocab_size;
    if (top_k == vocab_size && top_p == 1.0) return {kNothing, vocab_size, sums.sum};
    const std::int64_t count = collect(lowest_kept(top_k, top_p));
    Candidate<Real>* candidates = room->candidates.data();
    std::int64_t kept = count;
    double mass = sums.sum;
    if (top_k < vocab_size) {
      kept = top_k;
      std::nth_element(candidates, candidates + kept - 1, candidates + count, ranks_before<Real>);
      mass = mass_of(candidates, kept);
    }
    if (top_p < 1.0) {
      kept = select_mass(candidates, kept, top_p * mass);
      mass = mass_of(candidates, kept);
    }
    return {candidates[kept - 1].z, candidates[kept - 1].id, mass};
  }

  // Returns a z that no token to be kept is below.
  Real lowest_kept(std::int64_t top_k, double top_p) {
    if (top_k < vocab_size) {
      // In k blocks the largest z is the k-th largest or above, so at least k tokens are.
      if (top_k > num_blocks()) return kNothing;
      room->ranked = room->tops;
      const auto kth = room->ranked.begin() + (top_k - 1);
      std::nth_element(room->ranked.begin(), kth, room->ranked.end(), std::greater<Real>());
      return *kth;
    }
    // All tokens below this z together have less mass than V exp(z - max z) = (1 - top_p) sum. The
    // margin is above the rounding of z and of the sum.
    const Real top = sums.max / temperature;
    const double depth = std::log((1.0 - top_p) * sums.sum / static_cast<double>(vocab_size));
    return static_cast<Real>(top + depth - 0.01 - 1e-6 * std::abs(top));
  }

  // Makes candidates of the tokens with z >= `lowest`; returns their number.
  std::int64_t collect(Real lowest) {
    std::int64_t found = 0;
    for (std::int64_t block = 0; block < num_blocks(); ++block) {
      if (room->tops[block] < lowest) continue;
      const std::int64_t start = block * kBlock, count = std::min(kBlock, vocab_size - start);
      Chunk<Real> chunk_room;
      const Real* chunk = load_chunk(x + start, count, &chunk_room);
      Real z[kBlock], mass[kBlock];
      for (std::int64_t j = 0; j < round_up(count); ++j) {
        z[j] = chunk[j] / temperature;
        mass[j] = exp2_nonpositive((chunk[j] - sums.max) * scale);
      }
      auto& candidates = room->candidates;
      const auto needed = static_cast<std::size_t>(found + count);
      if (candidates.size() < needed) candidates.resize(needed);
      for (std::int64_t j = 0; j < count; ++j) {  // all are written: a branch would be mispredicted
        candidates[static_cast<std::size_t>(found)] = {z[j], mass[j], start + j};
        found += z[j] >= lowest;
      }
    }
    return found;
  }

  // Returns the argmax of z + noise over the tokens kept.
  std::int64_t draw(const Truncation<Real>& truncation) const {
    Best best;
    const auto likeliest = std::max_element(room->tops.begin(), room->tops.end());
    const std::int64_t first = likeliest - room->tops.begin();
    draw_from(first, truncation, &best);
    for (std::int64_t block = 0; block < num_blocks(); ++block) {
      if (block != first) draw_from(block, truncation, &best);
    }
    return best.id;
  }

  struct Best {
    Real value = kNothing;
    std::int64_t id = 0;
  };

  // Skips a block once an upper bound of its z + noise is below the best so far: its largest z with
  // the largest possible noise, its largest z with the bound of its smallest word, or each z with
  // the bound of its own word. Rounded addition is monotone, so that none of its tokens could have
  // been the best. Logarithms are computed for the few tokens that are left.
  void draw_from(std::int64_t block, const Truncation<Real>& truncation, Best* best) const {
    const Real top = room->tops[block];
    if (top < truncation.last_z || top + kLargestNoise < best->value) return;
    PhiloxWords words;
    philox4x32(static_cast<std::uint32_t>(block * kCounters), position, seed, &words);
    if (top + noise_bound(smallest(words)) < best->value) return;
    const std::int64_t start = block * kBlock, count = std::min(kBlock, vocab_size - start);
    Chunk<Real> chunk_room;
    const Real* chunk = load_chunk(x + start, count, &chunk_room);
    Real bounds[kBlock];
    for (std::int64_t i = 0; i < kCounters; ++i) {
      for (int lane = 0; lane < 4; ++lane) {
        bounds[4 * i + lane] = noise_bound(words.lanes[lane][i]);
      }
    }
    for (std::int64_t j = 0; j < round_up(count); ++j) bounds[j] += chunk[j] / temperature;
    if (largest_of_block(bounds, round_up(count)) < best->value) return;
    for (std::int64_t j = 0; j < count; ++j) {
      if (bounds[j] < best->value) continue;
      const Real z = chunk[j] / temperature, value = z + gumbel_noise(words.lanes[j % 4][j / 4]);
      const bool better = value > best->value || (value == best->value && start + j < best->id);
      if (better && truncation.keeps(z, start + j)) *best = {value, start + j};
    }
  }
};

template <typename T>
void sample_row(const SampleTokensArgs& args, std::int64_t i) {
  using Real = Compute<T>;
  auto* logprobs = static_cast<Real*>(args.logprobs);
  auto* sampling_logprobs = static_cast<Real*>(args.sampling_logprobs);
  static thread_local SampleRoom<Real> room;
  SampleRow<T> row{static_cast<const T*>(args.logits) + i * args.row_stride,
                   args.vocab_size,
                   static_cast<Real>(args.temperature),
                   log2_scale<Real>(args.temperature),
                   static_cast<std::uint64_t>(args.seeds[i]),
                   static_cast<std::uint32_t>(args.positions[i]),
                   &room};
  row.scan();
  if (!row.has_distribution()) {
    args.tokens[i] = 0;
    logprobs[i] = sampling_logprobs[i] = kNan;
    return;
  }
  const Truncation<Real> truncation = row.truncate(args.top_k, args.top_p);
  const std::int64_t token = row.draw(truncation);
  const double d = (static_cast<double>(widen(row.x[token])) - row.sums.max) / args.temperature;
  args.tokens[i] = token;
  logprobs[i] = static_cast<Real>(d - row.sums.log_sum());
  sampling_logprobs[i] = static_cast<Real>(d - std::log(truncation.mass));
}

inline void sample_tokens(const SampleTokensArgs& args, int num_threads) {
  constexpr std::int64_t kCost = 4;  // a token, in ns
  with_dtype(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(args.num_rows, kCost * args.vocab_size, num_threads,
                 [&](std::int64_t i) { sample_row<T>(args, i); });
  });
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
