"""Rewards: ready-made ones, and what calls them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_fast.rewards.asynchronous import AsyncReward, TryAgain
    from ppo_fast.rewards.classifier import ClassifierReward
    from ppo_fast.rewards.constitution import Constitution
    from ppo_fast.rewards.http import HTTPReward
    from ppo_fast.rewards.judge import JudgeReward
    from ppo_fast.rewards.principles import Principle, WordRules
    from ppo_fast.rewards.revise import preference_pairs, supervised_pairs
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
    from ppo_fast.rewards.yes_no import Question, YesNoJudge, YesNoModel

__all__ = [
    "AsyncReward",
    "ClassifierReward",
    "Constitution",
    "ExactMatch",
    "HTTPReward",
    "JudgeReward",
    "Length",
    "NumericMatch",
    "Principle",
    "Question",
    "RegexMatch",
    "Repetition",
    "SimilarityReward",
    "TryAgain",
    "WordRules",
    "YesNoJudge",
    "YesNoModel",
    "exact_match",
    "numeric_match",
    "preference_pairs",
    "repetition",
    "supervised_pairs",
]

# Where each name is defined. It is loaded when it is first asked for (PEP 562), so that
# `from ppo_fast.rewards import exact_match` loads neither torch nor transformers.
_MODULES = {
    "AsyncReward": "asynchronous",
    "ClassifierReward": "classifier",
    "Constitution": "constitution",
    "ExactMatch": "text",
    "HTTPReward": "http",
    "JudgeReward": "judge",
    "Length": "text",
    "NumericMatch": "text",
    "Principle": "principles",
    "Question": "yes_no",
    "RegexMatch": "text",
    "Repetition": "text",
    "SimilarityReward": "similarity",
    "TryAgain": "asynchronous",
    "WordRules": "principles",
    "YesNoJudge": "yes_no",
    "YesNoModel": "yes_no",
    "exact_match": "text",
    "numeric_match": "text",
    "preference_pairs": "revise",
    "repetition": "text",
    "supervised_pairs": "revise",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
