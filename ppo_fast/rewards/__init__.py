"""Rewards: ready-made ones, and what calls them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_fast.rewards.asynchronous import AsyncReward, TryAgain
    from ppo_fast.rewards.classifier import ClassifierReward
    from ppo_fast.rewards.http import HTTPReward
    from ppo_fast.rewards.judge import JudgeReward
    from ppo_fast.rewards.similarity import SimilarityReward
    from ppo_fast.rewards.text import (
        ExactMatch,
        Length,
        NumericMatch,
        RegexMatch,
        Repetition,
        exact_match,
        numeric_match,
        repetition,
    )

__all__ = [
    "AsyncReward",
    "ClassifierReward",
    "ExactMatch",
    "HTTPReward",
    "JudgeReward",
    "Length",
    "NumericMatch",
    "RegexMatch",
    "Repetition",
    "SimilarityReward",
    "TryAgain",
    "exact_match",
    "numeric_match",
    "repetition",
]

# Where each name is defined. It is loaded when it is first asked for (PEP 562), so that
# `from ppo_fast.rewards import exact_match` loads neither torch nor transformers.
_MODULES = {
    "AsyncReward": "asynchronous",
    "ClassifierReward": "classifier",
    "ExactMatch": "text",
    "HTTPReward": "http",
    "JudgeReward": "judge",
    "Length": "text",
    "NumericMatch": "text",
    "RegexMatch": "text",
    "Repetition": "text",
    "SimilarityReward": "similarity",
    "TryAgain": "asynchronous",
    "exact_match": "text",
    "numeric_match": "text",
    "repetition": "text",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
