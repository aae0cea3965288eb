"""Prompts -> tokens: batched, KV-cached decoding, and other engines behind one protocol."""

from ppo_fast.rollout.continuous import TransformersEngine
from ppo_fast.rollout.decode import decode
from ppo_fast.rollout.engine import Engine, LocalEngine, eos_ids
from ppo_fast.rollout.rollout import Rollout
from ppo_fast.rollout.sampling import Sampling

__all__ = [
    "Engine",
    "LocalEngine",
    "Rollout",
    "Sampling",
    "TransformersEngine",
    "decode",
    "eos_ids",
]
