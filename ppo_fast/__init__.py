"""ppo_fast: PPO for language models with a fast core."""

from importlib.metadata import PackageNotFoundError, version

from ppo_fast.config import PPOConfig
from ppo_fast.experience import Experience
from ppo_fast.models import RewardModel, ValueModel
from ppo_fast.rewards import ClassifierReward
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
