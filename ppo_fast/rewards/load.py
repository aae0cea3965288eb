"""Load a reward by its name on the command line."""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path
from typing import Any

import torch


def load_reward(reward: str, device: str) -> Any:
    """Load a function from ``module:function``, or a classifier from a directory or hub name.

    Raises:
        ValueError: the module has no such function, or the classifier has several labels.
        ModuleNotFoundError: no such module.
    """
    name, colon, function = reward.partition(":")
    if not colon or Path(reward).exists():
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from ppo_fast.rewards.classifier import ClassifierReward

        model = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32)
        return ClassifierReward(model.to(device), AutoTokenizer.from_pretrained(reward))
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does, for what the module imports too
    module = importlib.import_module(name)
    found = getattr(module, function, None)
    if not callable(found):
        near = difflib.get_close_matches(function, dir(module), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"--reward: module {name} has no function {function!r}{hint}")
    return found
