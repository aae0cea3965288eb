"""Prompts -> tokens: batched, KV-cached decoding."""

from ppo_fast.rollout.decode import Decoded, Sampling, decode
from ppo_fast.rollout.rollout import Rollout

__all__ = ["Decoded", "Rollout", "Sampling", "decode"]
