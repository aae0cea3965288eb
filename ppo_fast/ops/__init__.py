"""The mathematics of PPO for language models, each op usable alone in any trainer.

Legend everywhere: B sequences, P prompt tokens, T response tokens, V vocabulary, D hidden size.
"""

from ppo_fast.ops.decode_attention import decode_attention
from ppo_fast.ops.few_row_linear import few_row_linear
from ppo_fast.ops.gae import GAE, gae
from ppo_fast.ops.kl_estimate import kl_estimate
from ppo_fast.ops.linear_logprobs import linear_logprobs
from ppo_fast.ops.logprobs import TokenLogprobs, logprobs_from_logits
from ppo_fast.ops.ppo_loss import PPOLoss, ppo_loss
from ppo_fast.ops.quantize_rows import QuantizedRows, quantize_rows
from ppo_fast.ops.sample_tokens import Sampled, sample_tokens
from ppo_fast.ops.stats import ppo_metrics, value_metrics
from ppo_fast.ops.value_loss import ValueLoss, value_loss
from ppo_fast.ops.whiten import whiten

__all__ = [
    "GAE",
    "PPOLoss",
    "QuantizedRows",
    "Sampled",
    "TokenLogprobs",
    "ValueLoss",
    "decode_attention",
    "few_row_linear",
    "gae",
    "kl_estimate",
    "linear_logprobs",
    "logprobs_from_logits",
    "ppo_loss",
    "ppo_metrics",
    "quantize_rows",
    "sample_tokens",
    "value_loss",
    "value_metrics",
    "whiten",
]
