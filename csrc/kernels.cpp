// All kernels, compiled for the instruction set PPO_FAST_ISA (CMakeLists.txt has the flags).
#include "kernels.hpp"

#define PPO_FAST_JOIN(a, b) a##b
#define PPO_FAST_TABLE(isa) PPO_FAST_JOIN(kernels_, isa)
#define PPO_FAST_QUOTE(text) #text
#define PPO_FAST_NAME(isa) PPO_FAST_QUOTE(isa)

namespace ppo_fast {

const Kernels PPO_FAST_TABLE(PPO_FAST_ISA) = {
    PPO_FAST_NAME(PPO_FAST_ISA), PPO_FAST_ISA::decode_layer,     PPO_FAST_ISA::few_row_linear,
    PPO_FAST_ISA::gae,           PPO_FAST_ISA::logprobs_forward, PPO_FAST_ISA::logprobs_backward,
    PPO_FAST_ISA::fold_tile,     PPO_FAST_ISA::finish_rows,      PPO_FAST_ISA::tile_gradient,
    PPO_FAST_ISA::sample_tokens, PPO_FAST_ISA::kl_estimate,      PPO_FAST_ISA::ppo_loss,
    PPO_FAST_ISA::quantize_rows, PPO_FAST_ISA::value_loss,       PPO_FAST_ISA::whiten,
    PPO_FAST_ISA::whiten_backward,
};

}  // namespace ppo_fast
