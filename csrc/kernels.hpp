// The kernels of each instruction set that they were compiled for, and the set in use.
#pragma once

#include "kernels/decode_layer.hpp"
#include "kernels/few_row_linear.hpp"
#include "kernels/gae.hpp"
#include "kernels/kl_estimate.hpp"
#include "kernels/linear_logprobs.hpp"
#include "kernels/logprobs.hpp"
#include "kernels/ppo_loss.hpp"
#include "kernels/quantize_rows.hpp"
#include "kernels/sample_tokens.hpp"
#include "kernels/value_loss.hpp"
#include "kernels/whiten.hpp"

namespace ppo_fast {

struct Kernels {
  const char* instruction_set;
  void (*decode_layer)(const DecodeLayerArgs&, int num_threads);
  void (*few_row_linear)(const FewRowLinearArgs&, int num_threads);
  void (*gae)(const GaeArgs&, int num_threads);
  void (*logprobs_forward)(const LogprobsArgs&, int num_threads);
  void (*logprobs_backward)(const LogprobsBackwardArgs&, int num_threads);
  void (*fold_tile)(const FoldArgs&, int num_threads);
  void (*finish_rows)(const FinishArgs&);
  void (*tile_gradient)(const TileGradientArgs&, int num_threads);
  void (*sample_tokens)(const SampleTokensArgs&, int num_threads);
  void (*kl_estimate)(const KlEstimateArgs&, int num_threads);
  void (*ppo_loss)(const PpoLossArgs&, int num_threads);
  void (*quantize_rows)(const QuantizeRowsArgs&, int num_threads);
  void (*value_loss)(const ValueLossArgs&, int num_threads);
  void (*whiten)(const WhitenArgs&, int num_threads);
  void (*whiten_backward)(const WhitenBackwardArgs&, int num_threads);
};

// x86-64: the instructions that every such processor has. aarch64: NEON, which every one has.
extern const Kernels kernels_baseline;
// Each is there only where PPO_FAST_HAVE_AVX2 and so on is defined. AVX2 and FMA; AVX-512 F, BW, VL
// and DQ; these and AVX-512 BF16.
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;

// The kernels in use: the best that this processor can run, or those that use_instruction_set chose
// (bindings/module.cpp).
const Kernels& kernels();

}  // namespace ppo_fast
