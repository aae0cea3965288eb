"""Sampler: from prompts to rollouts with texts, by an engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ppo_fast.data.ended import OnEnd
from ppo_fast.data.examples import Example
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.sampling import Sampling
from ppo_fast.data.tokens import check_seeds
from ppo_fast.models.precision import WeightCopies
from ppo_fast.rollout.engine import Engine
from ppo_fast.rollout.local_engine import LocalEngine
from ppo_fast.rollout.texts import Texts
from ppo_fast.rollout.turns import Environment
from ppo_fast.user_code import arguments, lacking, parameters

# Given a prompt, and the columns of its row that it takes by name.
MakeEnvironment = Callable[..., Environment]


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
        prompts: Sequence[Example],
        sampling: Sampling,
        seeds: Tensor,
        samples_per_prompt: int = 1,
        readers: Mapping[str, Any] | None = None,
        on_end: OnEnd | None = None,
    ) -> Rollout:
        """Sample ``samples_per_prompt`` responses to each prompt, in rows next to one another.

        ``seeds`` [B] int64 are one for each response. ``readers`` are the models besides the policy
        that will read the sequences: prompts that are cut leave room for these too. ``on_end`` is
        called with each response as soon as it has ended, if the engine tells.
        """
        once = self.texts.encode(prompts, sampling.max_length, cut_for=readers)
        read = [prompt for prompt in once for _ in range(samples_per_prompt)]
        examples = [example for example in prompts for _ in range(samples_per_prompt)]
        prompt_ids = [prompt.ids for prompt in read]
        check_seeds(seeds, len(examples))
        with self._weight_copies.in_use(policy_model):
            self.engine.sync_weights(policy_model)
            generate: Any = self.engine.generate
            if on_end is not None and "ended" in parameters(generate).names:
                generate = partial(generate, ended=self.texts.as_they_end(read, on_end))
            if self._make_environment is None:
                rollout = generate(prompt_ids, sampling, seeds=seeds)
            else:
                assert isinstance(self.engine, LocalEngine)
                make = self._make_environment
                self.check_columns({name for e in examples for name in e.columns})
                given = (arguments(make, [e.prompt], e.columns) for e in examples)
                environments = [make(*by_position, **named) for by_position, named in given]
                check_environments(environments)
                turns = self.texts.turns(environments)
                rollout = generate(prompt_ids, sampling, seeds=seeds, turns=turns)
        rollout = replace(rollout, samples_per_prompt=samples_per_prompt, examples=examples)
        return self.texts.decode(rollout, [prompt.text for prompt in read])

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise ValueError if the environment takes a column that is not among ``columns``."""
        if self._make_environment is None:
            return
        if missing := lacking(self._make_environment, 1, columns):
            raise ValueError(
                f"environment: takes the column {missing[0]!r}, which the data lacks (its columns "
                f"beside the prompt: {', '.join(columns) or 'none'}); add it to the rows of the "
                "prompts, or give the parameter a default"
            )


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
