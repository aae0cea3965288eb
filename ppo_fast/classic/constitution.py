"""Principles, frameworks and filters of texts in the classic interface.

They are thin over ``ppo_fast.rewards.constitution``, which scores responses for training. A score
is in [0, 1], and 1 is best; a text is flagged where it is at most 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.checks import check_fields, number
from ppo_fast.rewards.constitution import Constitution
from ppo_fast.rewards.principles import Principle, WordRules, default_principles
from ppo_fast.rewards.revise import Generate, critique, revise
from ppo_fast.user_code import taken

FLAGGED = 0.5
NO_PROMPT = "(not given)"  # where questions ask about a text alone


@dataclass
class ConstitutionalPrinciple:
    """A principle that texts are evaluated by.

    Args:
        name: its name in results.
        description: what it asks.
        evaluation_fn: ``f(text, model, tokenizer, device)``, or a function with fewer of these
            names; returns a score, or a dict with "score" or "flagged" and anything else.
        weight: relative to the other principles'.
        enabled: whether a framework uses it.
    """

    name: str
    description: str
    evaluation_fn: Callable[..., Any]
    weight: float = number(1.0, above=0)
    enabled: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not callable(self.evaluation_fn):
            raise TypeError(f"evaluation_fn: got {self.evaluation_fn!r}, expected a function")

    def evaluate(
        self,
        text: str,
        model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Any]:
        """Return what ``evaluation_fn`` finds in a text, with "score" and "flagged" at least.

        Of a principle that is not enabled, the score is None.

        Raises:
            ValueError: there is neither, or the score is no finite number.
        """
        about = {"principle_name": self.name, "enabled": self.enabled}
        if not self.enabled:
            return about | {"score": None, "flagged": False}
        given = {"model": model, "tokenizer": tokenizer, "device": device}
        found = self.evaluation_fn(text, **taken(self.evaluation_fn, given, positional=1))
        found = dict(found) if isinstance(found, Mapping) else {"score": found}
        if "score" not in found and "flagged" not in found:
            raise ValueError(
                f"principle {self.name}: its evaluation_fn gave the keys {', '.join(found)}, "
                'expected "score" or "flagged" among them'
            )
        found["score"] = score = self._finite(
            found.get("score", 0.0 if found.get("flagged") else 1.0)
        )
        return about | {"flagged": score <= FLAGGED} | found

    def _finite(self, score: Any) -> float:
        try:
            number = math.nan if isinstance(score, str) else float(score)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"principle {self.name}: its evaluation_fn gave the score {score!r}, expected a "
                "finite number"
            )
        return number


class ConstitutionalFramework:
    """Principles that texts are evaluated by: by a model where one is given, else by rules.

    It is also a reward: ``framework(prompts, completions)`` gives each completion's weighted score.

    Args:
        name: its name.
        model, tokenizer: a causal LM that evaluation functions may ask.
        device: where the model goes; None: where it is.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.name, self.tokenizer, self.device = name, tokenizer, device
        self.model = model if model is None or device is None else model.to(device)
        self.principles: dict[str, ConstitutionalPrinciple] = {}
        self.evaluation_history: list[dict[str, Any]] = []

    def add_principle(self, principle: ConstitutionalPrinciple) -> None:
        """Add a principle, or replace the one of its name."""
        self.principles[principle.name] = principle

    def remove_principle(self, name: str) -> None:
        """Remove a principle; KeyError if there is none of this name."""
        del self.principles[self._known(name)]

    def enable_principle(self, name: str) -> None:
        """Use a principle from now on; KeyError if there is none of this name."""
        self.principles[self._known(name)].enabled = True

    def disable_principle(self, name: str) -> None:
        """Leave a principle out from now on; KeyError if there is none of this name."""
        self.principles[self._known(name)].enabled = False

    def get_active_principles(self) -> list[str]:
        """Return the names of the enabled principles."""
        return [name for name, principle in self.principles.items() if principle.enabled]

    def evaluate_text(self, text: str, track_history: bool = False) -> dict[str, Any]:
        """Evaluate a text by all enabled principles.

        Returns:
            principle_results (by name), any_flagged, flagged_principles, weighted_score (the
            weighted mean of the scores; 1.0 without principles) and evaluation_method, "model" or
            "rules".
        """
        active = [self.principles[name] for name in self.get_active_principles()]
        results = {
            p.name: p.evaluate(text, self.model, self.tokenizer, self.device) for p in active
        }
        flagged = [name for name, result in results.items() if result["flagged"]]
        total = sum(principle.weight for principle in active)
        scores = [principle.weight * results[principle.name]["score"] for principle in active]
        found = {
            "principle_results": results,
            "any_flagged": bool(flagged),
            "flagged_principles": flagged,
            "weighted_score": sum(scores) / total if active else 1.0,
            "evaluation_method": "rules" if self.model is None else "model",
        }
        if track_history:
            self.evaluation_history.append({"text": text, **found})
        return found

    def batch_evaluate(
        self, texts: Sequence[str], track_history: bool = False
    ) -> list[dict[str, Any]]:
        """Evaluate texts, as ``evaluate_text`` does each."""
        return [self.evaluate_text(text, track_history) for text in texts]

    def get_statistics(self) -> dict[str, Any]:
        """Return numbers of the tracked history: evaluations, and how many were flagged."""
        history = self.evaluation_history
        flagged = [entry["flagged_principles"] for entry in history]
        count = sum(map(bool, flagged))
        return {
            "total_evaluations": len(history),
            "total_flagged": count,
            "flagged_rate": count / len(history) if history else 0.0,
            "principle_flags": {
                name: sum(name in names for names in flagged) for name in self.principles
            },
        }

    def clear_history(self) -> None:
        """Forget the tracked evaluations."""
        self.evaluation_history.clear()

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [result["weighted_score"] for result in self.batch_evaluate(completions)]

    def _known(self, name: str) -> str:
        if name not in self.principles:
            known = ", ".join(self.principles) or "none"
            raise KeyError(f"no principle {name!r}; there are: {known}")
        return name


def setup_default_framework(
    model: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str | None = None,
) -> ConstitutionalFramework:
    """Make a framework of the four default principles: harm, truthfulness, fairness, autonomy.

    Args:
        model, tokenizer, device: as ``ConstitutionalFramework``; without a model, texts are
            evaluated by the lists of words of ``ppo_fast/rewards/principles.yaml``.
    """
    framework = ConstitutionalFramework("default", model, tokenizer, device)
    pairs = zip(default_principles(), default_principles(rules=True), strict=True)
    for asked, ruled in pairs:
        evaluate = _Evaluation(asked, ruled)
        framework.add_principle(ConstitutionalPrinciple(asked.name, asked.description, evaluate))
    return framework


class _Evaluation:
    """Evaluates texts by a principle's question where a model is given, else by its rules."""

    def __init__(self, asked: Principle, ruled: Principle) -> None:
        assert isinstance(ruled.evaluator, WordRules)
        self.asked, self.rules = asked, ruled.evaluator
        self._constitution: Constitution | None = None

    def __call__(
        self,
        text: str,
        model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Any]:
        if model is None:
            (score,) = self.rules([NO_PROMPT], [text])
            return {"score": score, "matches": self.rules.matches(text)}
        modes = [(part, part.training) for part in model.modules()]
        if self._constitution is None or self._constitution.judge.model is not model:
            self._constitution = Constitution([self.asked], judge=model, tokenizer=tokenizer)
        model.eval()
        try:
            (score,) = self._constitution.scores([NO_PROMPT], [text])
        finally:
            for part, training in modes:
                part.training = training
        return {"score": score}


def critique_and_revise(
    generate: Generate, prompt: str, response: str, principle: ConstitutionalPrinciple
) -> dict[str, str]:
    """Ask for a critique of a response by a principle, and for the response revised by it.

    Args:
        generate: takes a list of requests, and returns a text for each.
        prompt, response, principle: what is revised.

    Returns:
        The texts under critique and revision.
    """
    asked = Principle(principle.name, principle.description, principle.evaluation_fn)
    found = critique(generate, [prompt], [response], asked)
    revised = revise(generate, [prompt], [response], found, asked)
    return {"critique": found[0], "revision": revised[0]}


def compare_responses(
    framework: ConstitutionalFramework, prompt: str, response_a: str, response_b: str
) -> dict[str, Any]:
    """Compare two responses by their weighted scores.

    Returns:
        preferred ("A", "B" or None where they are equal), score_a, score_b, and pair: a dict of
        prompt, response_chosen and response_rejected, as ``train_reward_model`` takes it; None
        where they are equal.
    """
    a, b = framework([prompt] * 2, [response_a, response_b])
    pair = None
    if a != b:
        better, worse = (response_a, response_b) if a > b else (response_b, response_a)
        pair = {"prompt": prompt, "response_chosen": better, "response_rejected": worse}
    preferred = None if pair is None else ("A" if a > b else "B")
    return {"preferred": preferred, "score_a": a, "score_b": b, "pair": pair}


class ConstitutionalFilter:
    """Says whether a text of a user or of a model passes a framework.

    Args:
        framework: flags texts.
        replacement: what ``filter_output`` returns for a text that does not pass.
    """

    def __init__(
        self, framework: ConstitutionalFramework, replacement: str = "I cannot say that."
    ) -> None:
        self.framework, self.replacement = framework, replacement

    def filter_input(self, text: str) -> dict[str, Any]:
        """Return allowed, flagged_principles and evaluation of a user's text."""
        found = self.framework.evaluate_text(text)
        return {
            "allowed": not found["any_flagged"],
            "flagged_principles": found["flagged_principles"],
            "evaluation": found,
        }

    def filter_output(self, text: str) -> dict[str, Any]:
        """Return the same of a model's text, and text: itself, or the replacement."""
        found = self.filter_input(text)
        return found | {"text": text if found["allowed"] else self.replacement}
