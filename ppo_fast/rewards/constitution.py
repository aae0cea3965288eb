"""A constitution: principles that score responses together, as a reward (Bai et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.rewards.classifier import ClassifierReward
from ppo_fast.rewards.functions import missing_columns
from ppo_fast.rewards.principles import Principle, default_principles, read_principles
from ppo_fast.rewards.yes_no import YesNoModel, readable_prompts
from ppo_fast.user_code import taken


class Constitution:
    """Principles that score responses together, as a reward.

    A response's score is the weighted mean of its principles' scores, in [0, 1]; a principle whose
    evaluator does not judge it (None) counts 0, with its weight. Called as a reward, it returns the
    parts: each principle's score times its share of the enabled weights.

    Questions of all principles are asked together, in batches. Without a judge of its own, they go
    to the frozen reference of the trainer that the constitution is given to.

    Args:
        principles: None: the four that ``default_principles()`` returns.
        judge: a transformers causal LM, or a ``YesNoModel`` that has one.
        tokenizer: of a ``judge`` that is a causal LM.

    Attributes:
        principles: all of them, those that are not enabled too.
        judge: the YesNoModel.

    Raises:
        TypeError: ``principles`` holds something else.
        ValueError: there are none or two of one name, or none is enabled; the judge does not fit.
    """

    name = "constitution"

    def __init__(
        self,
        principles: Sequence[Principle] | None = None,
        *,
        judge: nn.Module | YesNoModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.principles = tuple(default_principles() if principles is None else principles)
        _check_principles(self.principles)
        if isinstance(judge, YesNoModel):
            if tokenizer is not None:
                raise ValueError("tokenizer: the YesNoModel given as judge has its own")
            self.judge = judge
        else:
            self.judge = YesNoModel(judge, tokenizer)
        if self.judge.model is not None:
            self._check_words()

    @classmethod
    def default(
        cls,
        *,
        judge: nn.Module | YesNoModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rules: bool = False,
    ) -> Constitution:
        """Make the constitution of harm, truthfulness, fairness and autonomy.

        Args:
            judge, tokenizer: as the constructor has them.
            rules: evaluate by lists of words, without a model.
        """
        return cls(default_principles(rules=rules), judge=judge, tokenizer=tokenizer)

    @classmethod
    def from_file(
        cls,
        path: Path | str,
        *,
        judge: nn.Module | YesNoModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rules: bool = False,
    ) -> Constitution:
        """Make a constitution of the principles in a YAML file; see ``read_principles``."""
        return cls(read_principles(path, rules=rules), judge=judge, tokenizer=tokenizer)

    @property
    def active(self) -> list[Principle]:
        """The enabled principles."""
        return [principle for principle in self.principles if principle.enabled]

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns of the data that the evaluators take."""
        rewards = [p.evaluator for p in self.active if p.question is None]
        return tuple(dict.fromkeys(name for r in rewards for name in missing_columns(r, ())))

    def use_reference(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Ask the trainer's frozen reference, unless the constitution has a judge of its own."""
        self.judge.use_reference(model, tokenizer)
        self._check_words()
        for principle in self.active:
            if hasattr(principle.evaluator, "use_reference"):
                principle.evaluator.use_reference(model, tokenizer)

    def check(self) -> None:
        """Let evaluators that have a ``check()``, such as servers, say whether they answer."""
        for principle in self.active:
            check = getattr(principle.evaluator, "check", None)
            if callable(check):
                check()

    def to(self, device: torch.device | str) -> Constitution:
        """Move models of its own to ``device``."""
        self.judge.to(device)
        for principle in self.active:
            if hasattr(principle.evaluator, "to"):
                principle.evaluator.to(device)
        return self

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> dict[str, list[float | None]]:
        """Return the parts of B responses' scores by principle, whose sum is the score.

        Args:
            prompts, completions: B texts each.
            columns: lists of B for evaluators that take them; of ``messages``, chats that end with
                the response, the judge reads the prompts where they are given.

        Raises:
            RuntimeError: a principle asks a question and there is no judge.
            ValueError: an evaluator gives another number of scores, or one that is not finite or
                outside of [0, 1].
        """
        total = sum(principle.weight for principle in self.active)
        found = self.by_principle(prompts, completions, **columns)
        return {
            p.name: [None if s is None else s * p.weight / total for s in found[p.name]]
            for p in self.active
        }

    def scores(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        """Return the score of each response, in [0, 1]; the arguments are those of a call."""
        parts = self(prompts, completions, **columns)
        return [math.fsum(x or 0.0 for x in row) for row in zip(*parts.values(), strict=True)]

    def by_principle(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> dict[str, list[float | None]]:
        """Return each enabled principle's own scores, in [0, 1], without its weight."""
        asked = [(p.name, p.question) for p in self.active if p.question is not None]
        found: dict[str, list[float | None]] = {}
        if asked:
            read = readable_prompts(prompts, columns.get("messages"))
            questions = [question for _, question in asked for _ in completions]
            n = len(asked)
            odds = self.judge.ask(questions, read * n, list(completions) * n)
            rows = torch.tensor(odds).sigmoid().view(n, len(completions)).tolist()
            found = {name: row for (name, _), row in zip(asked, rows, strict=True)}
        for principle in self.active:
            if principle.question is None:
                found[principle.name] = _rewarded(principle, prompts, completions, columns)
        return {principle.name: found[principle.name] for principle in self.active}

    def _check_words(self) -> None:
        for principle in self.active:
            if principle.question is not None:
                self.judge.answer_ids(principle.question)


def _rewarded(
    principle: Principle,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Any],
) -> list[float | None]:
    reward: Any = principle.evaluator
    named = taken(reward, columns, positional=2)
    scores = reward(list(prompts), list(completions), **named)
    what = f"principle {principle.name}"
    if isinstance(scores, Mapping) or not hasattr(scores, "__iter__"):
        raise TypeError(f"{what}: its evaluator gave {type(scores).__name__}, expected a list")
    found = [None if score is None else float(score) for score in scores]
    if len(found) != len(completions):
        raise ValueError(
            f"{what}: its evaluator gave {len(found)} scores for {len(completions)} responses"
        )
    for score in found:
        if score is not None and not math.isfinite(score):
            raise ValueError(f"{what}: its evaluator gave {score!r}, expected finite numbers")
    if isinstance(reward, ClassifierReward):  # log-odds
        return [None if x is None else float(torch.tensor(x).sigmoid()) for x in found]
    for score in found:
        if score is not None and not 0 <= score <= 1:
            raise ValueError(
                f"{what}: its evaluator gave {score!r}, expected numbers from 0 to 1; squash them, "
                "for example by 1 / (1 + exp(-x))"
            )
    return found


def _check_principles(principles: Sequence[Principle]) -> None:
    for principle in principles:
        if not isinstance(principle, Principle):
            raise TypeError(
                f"principles: got a {type(principle).__name__}, expected Principle(name, "
                "description, evaluator)"
            )
    names = [principle.name for principle in principles]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"principles: got two of the name {twice[0]!r}")
    if not any(principle.enabled for principle in principles):
        raise ValueError("principles: got none that is enabled, expected at least one")
