"""Principles that responses are judged by: what each asks, and how it is evaluated."""

from __future__ import annotations

import importlib.resources
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ppo_fast.checks import check_fields, number
from ppo_fast.rewards.yes_no import Question

CRITIQUE = """A user wrote: {prompt}

The response was: {completion}

Name what in this response goes against this principle: {description}"""

REVISION = """A user wrote: {prompt}

The response was: {completion}

A critic said: {critique}

Write the response again so that it keeps this principle: {description}

Give only the new response."""

Reward = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Principle:
    """Something that is asked of responses, and how it is evaluated.

    Args:
        name: its name in metrics.
        description: what it asks, for people, and for requests of critique and revision.
        evaluator: a question to a language model (a text with the field {completion}, or a
            ``Question``), whose score is p(yes) / (p(yes) + p(no)); or a reward ``f(prompts,
            completions, **columns)`` that gives numbers in [0, 1], such as a function or
            ``WordRules``; or a ``ClassifierReward``, whose log-odds become probabilities.
        weight: its share in the score, relative to the other principles'.
        enabled: whether it counts.
        critique: a template that asks for a critique; fields: {prompt}, {completion},
            {description}.
        revision: a template that asks for a better response; also {critique}.

    Raises:
        TypeError, ValueError: a value does not fit.
    """

    name: str
    description: str
    evaluator: str | Question | Reward
    weight: float = number(1.0, above=0)
    enabled: bool = True
    critique: str = CRITIQUE
    revision: str = REVISION

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("name", "description", "critique", "revision"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{field}: got {value!r}, expected a text")
        if isinstance(self.evaluator, str):
            object.__setattr__(self, "evaluator", Question(self.evaluator))
        elif not isinstance(self.evaluator, Question):
            _check_reward(self.evaluator)

    @property
    def question(self) -> Question | None:
        """The question that evaluates it; None: its evaluator is a reward."""
        return self.evaluator if isinstance(self.evaluator, Question) else None


def _check_reward(evaluator: Any) -> None:
    call = evaluator if inspect.isfunction(evaluator) else getattr(evaluator, "__call__", None)  # noqa: B004
    if isinstance(evaluator, nn.Module) or not callable(evaluator):
        raise TypeError(
            f"evaluator: got {type(evaluator).__name__}, expected a question, a function "
            "f(prompts, completions) -> list of numbers in [0, 1], or ClassifierReward(...)"
        )
    if inspect.iscoroutinefunction(call):
        raise TypeError("evaluator: got an async function; pass AsyncReward(it)")


class WordRules:
    """Scores a response by patterns that it should not contain: 0.5 ** number of matches.

    Args:
        patterns: regular expressions; case does not matter.

    Raises:
        ValueError: there are none, or one is no regular expression.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        if isinstance(patterns, str) or not patterns:
            raise ValueError(f"rules: got {patterns!r}, expected a list of regular expressions")
        self.patterns = []
        for pattern in patterns:
            try:
                self.patterns.append(re.compile(pattern, re.IGNORECASE))
            except (re.error, TypeError) as error:
                raise ValueError(f"rules: {pattern!r} is no regular expression: {error}") from error

    def matches(self, text: str) -> list[str]:
        """Return the parts of a text that match, those of the first pattern first."""
        return [found[0] for pattern in self.patterns for found in pattern.finditer(text)]

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [0.5 ** len(self.matches(text)) for text in completions]


def default_principles(*, rules: bool = False) -> list[Principle]:
    """Return the four principles of ``ppo_fast/rewards/principles.yaml``.

    They are harm, truthfulness, fairness and autonomy.

    Args:
        rules: whether they are evaluated by their lists of patterns and not by questions.
    """
    file = importlib.resources.files("ppo_fast.rewards") / "principles.yaml"
    return _principles(file.read_text("utf-8"), "principles.yaml", rules)


def read_principles(path: Path | str, *, rules: bool = False) -> list[Principle]:
    """Read principles from a YAML file of the form of ``ppo_fast/rewards/principles.yaml``.

    Args:
        path: the file.
        rules: evaluate all of them by their ``rules``. Without it, ``rules`` count only where a
            principle has no question.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not YAML, or an entry does not fit; the message names both.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"constitution: no file {path}")
    try:
        return _principles(path.read_text("utf-8"), str(path), rules)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


def _principles(text: str, where: str, rules: bool) -> list[Principle]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    entries = content.get("principles") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or set(content) != {"principles"}:
        raise ValueError(f"{where}: expected one key, principles, with a list of them")
    return [
        _principle(entry, f"{where}, principle {n}", rules) for n, entry in enumerate(entries, 1)
    ]


OPTIONAL = ("weight", "enabled", "critique", "revision")
KEYS = ("name", "description", "question", "answers", "rules", *OPTIONAL)


def _principle(entry: Any, where: str, rules: bool) -> Principle:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: got {entry!r}, expected a mapping with {', '.join(KEYS)}")
    where = f"{where} ({entry['name']})" if isinstance(entry.get("name"), str) else where
    if unknown := [key for key in entry if key not in KEYS]:
        raise ValueError(f"{where}: has the key {unknown[0]!r}, expected {', '.join(KEYS)}")
    if missing := [key for key in ("name", "description") if key not in entry]:
        raise ValueError(f"{where}: has no {missing[0]}")
    try:
        options = {key: entry[key] for key in OPTIONAL if key in entry}
        evaluator = _evaluator(entry, rules)
        return Principle(entry["name"], entry["description"], evaluator, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _evaluator(entry: dict[str, Any], rules: bool) -> Question | WordRules:
    if "question" in entry and not rules:
        answers = entry.get("answers", ["Yes", "No"])
        if not isinstance(answers, list) or len(answers) != 2:
            raise ValueError(f'answers: got {answers!r}, expected two words, as ["Yes", "No"]')
        return Question(entry["question"], *answers)
    if "rules" in entry:
        return WordRules(entry["rules"])
    raise ValueError("has no rules" if rules else "has neither a question nor rules")
