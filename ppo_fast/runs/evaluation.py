"""Evaluate a policy on prompts that it is not trained on: once, or in the course of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ppo_fast.checkpointing.random_states import random_states, restore_random_states
from ppo_fast.checks import check_fields, whole
from ppo_fast.config import PPOConfig
from ppo_fast.data.evaluated import Evaluated
from ppo_fast.data.examples import Example, Prompt, Stream
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.scores import Scores
from ppo_fast.rewards.scorer import Scorer
from ppo_fast.runs.progress import Progress, digest_of

logger = logging.getLogger(__name__)

# Seed of the first sequence; the next ones are -2, -3, ... Seeds of the training are not negative.
EVALUATION_SEED = -1


@dataclass(frozen=True)
class Evaluation:
    """Evaluations in the course of a run, and what follows from them.

    One is made before the first step and one after the last. They change no draw of the training.

    prompts: held out, as ``PPO.rollout`` takes them.
    every: steps between evaluations; None: only before and after.
    samples_per_prompt: responses to each prompt.
    greedy: take the likeliest tokens instead of drawing them.
    reward: what judges the responses: as ``PPO`` takes it, with weights of 1; None: the trainer's.
    best: metric of the evaluations by which the best is found.
    lower_is_better: whether the best has the smallest number.
    keep_best: number of checkpoints that are kept besides those of ``keep_last``: those of the best
        evaluations.
    patience: evaluations in a row that are no new best, after which the run ends; None: it goes on.
    """

    prompts: Any
    every: int | None = whole(None, or_none=True)
    samples_per_prompt: int = whole(1)
    greedy: bool = False
    reward: Any = None
    best: str = "reward"
    lower_is_better: bool = False
    keep_best: int = whole(1, at_least=0)
    patience: int | None = whole(None, or_none=True)

    def __post_init__(self) -> None:
        check_fields(self)
        _check_greedy(self.greedy, self.samples_per_prompt)
        if self.patience is not None and self.every is None:
            raise ValueError(
                f"patience: got {self.patience} without every; set the steps between evaluations"
            )


class Evaluable(Protocol):
    """Interface of PPO that an evaluation uses."""

    progress: Progress
    scorer: Scorer

    @property
    def config(self) -> PPOConfig: ...

    def make_scorer(self, reward: Any) -> Scorer: ...

    def check_prompts(
        self, prompts: Any, max_length: int | None = None, *, scorer: Scorer | None = None
    ) -> list[Example] | Stream: ...

    def scores(self, rollout: Rollout, scorer: Scorer | None = None) -> Scores: ...

    def rollout(
        self,
        prompts: Any,
        max_length: int | None = None,
        temperature: float | None = None,
        *,
        samples_per_prompt: int | None = None,
        seeds: Tensor | None = None,
        greedy: bool = False,
        scorer: Scorer | None = None,
    ) -> Rollout: ...


class Evaluator:
    """Makes the evaluations of a run, and keeps their results in its progress.

    Evaluations that were made before with other prompts, rewards or ways of sampling cannot be
    compared with these; a warning says that they begin anew.

    Args:
        ppo: the trainer.
        evaluation: what is evaluated and when; None: nothing.
        max_length, temperature: of the responses; None: the config's.

    Raises:
        TypeError, ValueError: a prompt or a reward does not fit.
    """

    def __init__(
        self,
        ppo: Evaluable,
        evaluation: Evaluation | None,
        max_length: int | None = None,
        temperature: float | None = None,
    ) -> None:
        if evaluation is not None and not isinstance(evaluation, Evaluation):
            raise TypeError(
                f"evaluation: got {type(evaluation).__name__}, expected an Evaluation(prompts, ...)"
            )
        self._ppo, self._evaluation = ppo, evaluation
        self._sampling: dict[str, Any] = {"max_length": max_length, "temperature": temperature}
        if evaluation is None:
            return
        given = evaluation.reward
        self._scorer = ppo.scorer if given is None else ppo.make_scorer(given)
        self._examples = _checked(ppo, evaluation.prompts, self._scorer, max_length)
        kind = [evaluation.samples_per_prompt, evaluation.greedy, *self._scorer.rewards]
        digest = digest_of([*self._examples], repr(kind))
        if self._found and ppo.progress.evaluated != digest:
            logger.warning(
                "evaluation: it has other prompts, rewards or samples than the ones before, which "
                "are left out of the comparison"
            )
            ppo.progress.evaluations = []
        ppo.progress.evaluated = digest

    def due(self, *, last: bool = False, ahead: int = 0) -> bool:
        """Return whether to evaluate now: before the first step, after every n, after the last.

        Args:
            last: whether the last step is done.
            ahead: steps from now at which it is asked; 0: now.
        """
        one, done = self._evaluation, self._ppo.progress.steps + ahead
        if one is None or any(found["step"] == done for found in self._found):
            return False
        return not self._found or last or (one.every is not None and done % one.every == 0)

    def run(self) -> Evaluated:
        """Evaluate the policy as it is now.

        Raises:
            ValueError: the metric by which the best is found is not among the results.
        """
        one = self._evaluation
        assert one is not None
        rollout, scores = _sampled(
            self._ppo,
            self._examples,
            one.samples_per_prompt,
            one.greedy,
            self._scorer,
            **self._sampling,
        )
        metrics = evaluation_metrics(rollout, scores)
        if one.best not in metrics:
            raise ValueError(
                f"best: got {one.best!r}, expected a metric of the evaluation: {', '.join(metrics)}"
            )
        step = self._ppo.progress.steps
        self._found.append({"step": step} | metrics)
        return Evaluated(step, metrics, rollout, scores)

    @property
    def best(self) -> list[int]:
        """The steps of the best evaluations whose checkpoints are kept, the best first."""
        one = self._evaluation
        return [] if one is None else [step for step in self.ranked if step > 0][: one.keep_best]

    @property
    def ranked(self) -> list[int]:
        """The steps of all evaluations, the best first; 0: before training."""
        one = self._evaluation
        if one is None:
            return []
        found = [f for f in self._found if math.isfinite(f.get(one.best, math.nan))]
        found.sort(key=lambda f: f[one.best], reverse=not one.lower_is_better)
        return [int(f["step"]) for f in found]

    @property
    def exhausted(self) -> bool:
        """Whether the evaluations since the best are as many as ``patience`` allows."""
        one = self._evaluation
        if one is None or one.patience is None or not self._found:
            return False
        steps, ranked = [int(found["step"]) for found in self._found], self.ranked
        return bool(ranked) and len(steps) - 1 - steps.index(ranked[0]) >= one.patience

    @property
    def _found(self) -> list[dict[str, float]]:
        return self._ppo.progress.evaluations


def evaluate(
    ppo: Evaluable,
    prompts: Iterable[Prompt | Example | Mapping[str, Any]],
    samples_per_prompt: int = 1,
    *,
    greedy: bool = False,
    reward: Any = None,
) -> dict[str, float]:
    """Sample and score responses, always with the same seeds, which change no draw of the training.

    Args:
        ppo: a PPO or PPOTrainer.
        prompts: as ``PPO.rollout`` takes them.
        samples_per_prompt: responses to each.
        greedy: take the likeliest tokens instead of drawing them.
        reward: what judges the responses, as ``PPO`` takes it; None: the trainer's.

    Returns:
        reward (mean), standard_error (of the mean over responses), response_length (mean, in
            tokens), finished_fraction, and the mean and deviation of each reward.
    """
    _check_greedy(greedy, samples_per_prompt)
    scorer = ppo.scorer if reward is None else ppo.make_scorer(reward)
    examples = _checked(ppo, prompts, scorer)
    return evaluation_metrics(*_sampled(ppo, examples, samples_per_prompt, greedy, scorer))


def evaluation_metrics(rollout: Rollout, scores: Scores) -> dict[str, float]:
    """Return the metrics of an evaluation; see ``evaluate``."""
    totals = scores.total if scores.total.dim() == 1 else scores.total.sum(1)
    count = len(totals)
    return {
        "reward": float(totals.mean()),
        "standard_error": float(totals.std() / count**0.5) if count > 1 else 0.0,
        "response_length": float(rollout.tokens.response_lengths.float().mean()),
        "finished_fraction": float(rollout.finished.float().mean()),
    } | scores.metrics()


def _check_greedy(greedy: bool, samples_per_prompt: int) -> None:
    if greedy and samples_per_prompt > 1:
        raise ValueError(
            f"samples_per_prompt: got {samples_per_prompt} with greedy=True, expected 1: they "
            "would be the same"
        )


def _checked(
    ppo: Evaluable, prompts: Any, scorer: Scorer, max_length: int | None = None
) -> list[Example]:
    try:
        examples = ppo.check_prompts(prompts, max_length, scorer=scorer)
    except (TypeError, ValueError) as error:
        raise type(error)(f"evaluation: {error}") from error
    if isinstance(examples, Stream):
        raise TypeError("evaluation: got a stream of prompts, expected a list: all of it is read")
    return examples


def _sampled(
    ppo: Evaluable,
    examples: list[Example],
    count: int,
    greedy: bool,
    scorer: Scorer,
    **sampling: Any,
) -> tuple[Rollout, Scores]:
    """Sample and score, and leave all random generators as they were: rewards may draw."""
    seeds = EVALUATION_SEED - torch.arange(len(examples) * count, device="cpu")
    last, states = getattr(ppo, "last_rollout", None), random_states()
    try:
        rollout = ppo.rollout(
            examples,
            samples_per_prompt=count,
            seeds=seeds,
            greedy=greedy,
            scorer=scorer,
            **sampling,
        )
        return rollout, ppo.scores(rollout, scorer)
    finally:
        restore_random_states(states)
        if hasattr(ppo, "last_rollout"):
            ppo.last_rollout = last  # of the training, for methods that take texts
