"""Sampler: from prompts to rollouts with texts, by an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ppo_fast.data.prompts import Prompt
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.sampling import Sampling
from ppo_fast.data.tokens import check_seeds
from ppo_fast.models.precision import WeightCopies
from ppo_fast.rollout.engine import Engine
from ppo_fast.rollout.local_engine import LocalEngine
from ppo_fast.rollout.texts import Texts
from ppo_fast.rollout.turns import Environment

MakeEnvironment = Callable[[Prompt], Environment]


class Sampler:
    """Samples responses from the current policy.

    Args:
        engine: samples tokens.
        texts: turns prompts into ids, and sampled ids into texts.
        weight_copies: what decoding computes with.
        environment: makes, for a prompt, an object that replies within its response; None: none.
    """

    def __init__(
        self, engine: Engine, texts: Texts, weight_copies: WeightCopies, environment: Any = None
    ) -> None:
        self.engine, self.texts, self._weight_copies = engine, texts, weight_copies
        self._make_environment: MakeEnvironment | None = environment

    def sample(
        self,
        policy_model: nn.Module,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Tensor,
        samples_per_prompt: int = 1,
    ) -> Rollout:
        """Sample ``samples_per_prompt`` responses to each prompt, in rows next to one another.

        ``seeds`` [B] int64 are one for each response.
        """
        prompts = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
        prompt_ids = self.texts.encode(prompts, sampling.max_length)
        check_seeds(seeds, len(prompts))
        with self._weight_copies.in_use(policy_model):
            self.engine.sync_weights(policy_model)
            if self._make_environment is None:
                rollout = self.engine.generate(prompt_ids, sampling, seeds=seeds)
            else:
                assert isinstance(self.engine, LocalEngine)
                environments = [self._make_environment(prompt) for prompt in prompts]
                check_environments(environments)
                turns = self.texts.turns(environments)
                rollout = self.engine.generate(prompt_ids, sampling, seeds=seeds, turns=turns)
        return self.texts.decode(replace(rollout, samples_per_prompt=samples_per_prompt), prompts)


def check_environment(environment: Any, engine: Engine | None) -> None:
    """Check that ``environment`` makes environments, and that ``engine`` (None: local) knows turns.

    Raises:
        TypeError: it is no function, or ``engine`` does not.
    """
    if environment is None:
        return
    if not callable(environment):
        raise TypeError(
            f"environment: got {type(environment).__name__}, expected a function that makes an "
            "environment for a prompt"
        )
    if engine is not None and not isinstance(engine, LocalEngine):
        raise TypeError(
            f"environment: {type(engine).__name__} does not let an environment reply within "
            "responses; use engine=None"
        )


def check_environments(environments: Sequence[Any]) -> None:
    """Raise TypeError if one of the environments that were made cannot reply."""
    for made in environments:
        if not callable(getattr(made, "reply", None)):
            raise TypeError(
                f"environment: made {type(made).__name__}, expected an object with reply(turn)"
            )
