"""Rollouts: responses to prompts, by batched KV-cached decoding or by another engine."""

from ppo_fast.data.rollout import Rollout
from ppo_fast.data.sampling import Sampling
from ppo_fast.rollout.decode import decode
from ppo_fast.rollout.engine import Engine, eos_ids
from ppo_fast.rollout.local_engine import LocalEngine
from ppo_fast.rollout.transformers_engine import TransformersEngine
from ppo_fast.rollout.turns import Environment, Turn

__all__ = [
    "Engine",
    "Environment",
    "LocalEngine",
    "Rollout",
    "Sampling",
    "TransformersEngine",
    "Turn",
    "decode",
    "eos_ids",
]
