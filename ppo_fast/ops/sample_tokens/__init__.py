"""Drawing the next token of each sequence."""

from ppo_fast.ops.sample_tokens.api import Sampled, sample_tokens

__all__ = ["Sampled", "sample_tokens"]
