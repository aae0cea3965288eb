"""Log-prob and entropy of given tokens, from hidden states and the LM head."""

from ppo_fast.ops.linear_logprobs.api import linear_logprobs

__all__ = ["linear_logprobs"]
