"""Log-prob and entropy of given tokens, from logits."""

from ppo_fast.ops.logprobs.api import TokenLogprobs, logprobs_from_logits

__all__ = ["TokenLogprobs", "logprobs_from_logits"]
