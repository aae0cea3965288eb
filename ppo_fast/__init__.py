"""ppo_fast: PPO for language models with a fast core."""

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_fast.config import PPOConfig
    from ppo_fast.data.examples import Example
    from ppo_fast.data.experience import Experience
    from ppo_fast.data.files import read_prompts
    from ppo_fast.data.rollout import Rollout
    from ppo_fast.models.heads import RewardModel, ValueModel
    from ppo_fast.ppo import PPO
    from ppo_fast.rewards.classifier import ClassifierReward
    from ppo_fast.rewards.fit.settings import RewardModelConfig
    from ppo_fast.rewards.fit.train import train_reward_model
    from ppo_fast.runs.callbacks import Callback
    from ppo_fast.runs.evaluation import Evaluation, evaluate
    from ppo_fast.trackers.report_to import Trackers
    from ppo_fast.trainer import PPOTrainer

__all__ = [
    "PPO",
    "Callback",
    "ClassifierReward",
    "Evaluation",
    "Example",
    "Experience",
    "PPOConfig",
    "PPOTrainer",
    "RewardModel",
    "RewardModelConfig",
    "Rollout",
    "Trackers",
    "ValueModel",
    "evaluate",
    "read_prompts",
    "train_reward_model",
]

# Let torch's OpenMP threads spin for about 0.1 ms before they sleep. By default they spin for some
# milliseconds, even when another process occupies the processor of the thread that they wait for.
# libgomp reads the variable when torch loads it: set after that, it changes nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "4000")

# Where each name is defined. It is loaded when it is first asked for (PEP 562), so that
# `from ppo_fast.ops import gae` loads torch, but neither transformers nor the trainer.
_MODULES = {
    "PPO": "ppo_fast.ppo",
    "Callback": "ppo_fast.runs.callbacks",
    "ClassifierReward": "ppo_fast.rewards.classifier",
    "Evaluation": "ppo_fast.runs.evaluation",
    "Example": "ppo_fast.data.examples",
    "Experience": "ppo_fast.data.experience",
    "PPOConfig": "ppo_fast.config",
    "PPOTrainer": "ppo_fast.trainer",
    "RewardModel": "ppo_fast.models.heads",
    "RewardModelConfig": "ppo_fast.rewards.fit.settings",
    "Rollout": "ppo_fast.data.rollout",
    "Trackers": "ppo_fast.trackers.report_to",
    "ValueModel": "ppo_fast.models.heads",
    "evaluate": "ppo_fast.runs.evaluation",
    "read_prompts": "ppo_fast.data.files",
    "train_reward_model": "ppo_fast.rewards.fit.train",
}

try:
    __version__ = version("ppo_fast")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(_MODULES[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
