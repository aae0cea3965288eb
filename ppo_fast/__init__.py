"""ppo_fast: PPO for language models with a fast core."""

import os

# How long torch's OpenMP threads spin before they sleep, about 0.1 ms: by default it is some
# milliseconds, also while another process has the processor of the thread that they wait for. Read
# when torch is loaded; where it is loaded already, this changes nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "4000")

from importlib.metadata import PackageNotFoundError, version

from ppo_fast.config import PPOConfig
from ppo_fast.learning.make_experience import Experience
from ppo_fast.models.heads import RewardModel, ValueModel
from ppo_fast.rewards.score import ClassifierReward
from ppo_fast.rollout import Rollout
from ppo_fast.trainer import PPOTrainer

try:
    __version__ = version("ppo_fast")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "ClassifierReward",
    "Experience",
    "PPOConfig",
    "PPOTrainer",
    "RewardModel",
    "Rollout",
    "ValueModel",
]
