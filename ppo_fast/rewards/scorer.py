"""Scorer: calls the rewards of a trainer, and adds them with weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.data.ended import OnEnd
from ppo_fast.data.examples import Example
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.sampling import Sampling
from ppo_fast.data.scores import Scores
from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.offload import Resting, own_tensors
from ppo_fast.models.passes import Passes, head_passes
from ppo_fast.models.setup import put_on_trunk
from ppo_fast.rewards.asynchronous import AsyncReward, is_async
from ppo_fast.rewards.early import Asked, asks_early
from ppo_fast.rewards.functions import (
    ALWAYS,
    TEXTS,
    check_arity,
    missing_columns,
    missing_message,
    name_of,
    takes,
)
from ppo_fast.rewards.score import check_reward_model, score

logger = logging.getLogger(__name__)


class Scorer:
    """Scores responses by one reward or by several with weights.

    Args:
        reward: a module or a function (see ``score``), a list of these, or a dict of them by name.
            A RewardModel whose lower layers equal the policy's frozen trunk shares them from now
            on.
        policy: the policy.
        max_tokens: max tokens in one call of a module.
        weights: of the rewards in the list or dict; empty: 1 each.
        reference, tokenizer: for rewards that ask the frozen reference in words.

    Attributes:
        reward: as given.
        rewards: by name.

    Raises:
        TypeError, ValueError: a reward is none, or the number of weights is another.
    """

    def __init__(
        self,
        reward: Any,
        policy: LanguageModel,
        max_tokens: int,
        weights: Sequence[float] = (),
        *,
        reference: LanguageModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.reward, self.max_tokens = reward, max_tokens
        self.rewards = named_rewards(reward, weights)
        self.weights = dict(zip(self.rewards, weights or [1.0] * len(self.rewards), strict=True))
        self._passes = {name: _passes(model, policy) for name, model in self.rewards.items()}
        self._warned: set[str] = set()
        self._of_reference = set() if reference is None else {*reference.model.parameters()}
        self._calls = {name: _callable_at_once(one) for name, one in self.rewards.items()}
        self._asked: tuple[Tokens, Asked] | None = None
        self._reference = reference
        self._resting = Resting([])
        for one in map(without_wrapper, self.rewards.values()):
            if reference is not None and hasattr(one, "use_reference"):
                one.use_reference(reference.model, tokenizer)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The rewards that are modules and read the policy's tokens, by name."""
        return {name: one for name, one in self.rewards.items() if isinstance(one, nn.Module)}

    @property
    def reads_trunk(self) -> bool:
        """Whether scores are computed from trunk states, those of last tokens included."""
        return any(passes is not None and passes.split for passes in self._passes.values())

    def nbytes(self) -> int:
        """Return the size in bytes of reward models' weights; 0 for functions."""
        weights = {p for model in self._models() for p in model.parameters()}
        return sum(p.nbytes for p in weights - self._of_reference)

    def _models(self) -> list[nn.Module]:
        models = [_model_of(without_wrapper(one)) for one in self.rewards.values()]
        return [model for model in models if isinstance(model, nn.Module)]

    def rest(self, *others: nn.Module) -> None:
        """Keep reward models in host memory from now on, but while they score.

        Weights that the reference or one of ``others`` has too stay where they are.
        """
        known = [*others] if self._reference is None else [*others, self._reference.model]
        self._resting = Resting([t for model in self._models() for t in own_tensors(model, *known)])

    @contextmanager
    def _resident(self) -> Iterator[None]:
        with self._resting.resident(), ExitStack() as stack:
            if self._reference is not None and self._asks_reference:
                stack.enter_context(self._reference.resident())
            yield

    @property
    def _asks_reference(self) -> bool:
        """Whether a reward reads the reference's weights."""
        asks = any(hasattr(without_wrapper(one), "use_reference") for one in self.rewards.values())
        return asks or any(p in self._of_reference for m in self._models() for p in m.parameters())

    @property
    def functions(self) -> dict[str, Any]:
        """The rewards that are called with texts and columns, by name."""
        return {n: call for n, call in self._calls.items() if not isinstance(call, nn.Module)}

    def check_servers(self) -> None:
        """Call ``check()`` of the rewards that have one, such as servers, before a run."""
        for one in map(without_wrapper, self.functions.values()):
            if callable(getattr(one, "check", None)):
                one.check()

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise ValueError if a reward takes a column that is not among ``columns``.

        Warns once of columns whose names stand for something else.
        """
        for name, function in self.functions.items():
            if missing := missing_columns(function, columns):
                raise ValueError(missing_message(f"reward_model {name}", missing, columns))
        shadowed = {name for name in {*TEXTS, *ALWAYS} & set(columns) if self.takes(name)}
        for name in sorted(shadowed - self._warned):
            logger.warning(
                "rewards get ppo_fast's own %r, not the data's column of that name", name
            )
        self._warned |= shadowed

    def takes(self, column: str) -> bool:
        """Return whether a reward is given the column of this name."""
        return any(takes(function, column) for function in self.functions.values())

    def while_sampling(
        self, examples: Sequence[Example], sample: Callable[[OnEnd | None], Rollout]
    ) -> Rollout:
        """Return the rollout that ``sample`` makes, and ask for scores meanwhile.

        Rewards that send requests are asked for each response that ``sample`` says has ended, but
        for those with a model of their own, which decoding would have to share the device with.
        ``of_rollout`` of this rollout waits for the answers, once. Requests are cancelled if
        ``sample`` raises, or when another rollout is begun before.

        Args:
            examples: of the rollout's rows.
            sample: makes the rollout; it is given what to call for responses that have ended, or
                None if no reward asks early.
        """
        self._forget()
        early = {
            name: one
            for name, one in self._calls.items()
            if asks_early(one, examples)
            and not isinstance(_model_of(without_wrapper(one)), nn.Module)
        }
        if not early:
            return sample(None)
        asked = Asked(early, examples)
        try:
            rollout = sample(asked.note)
            asked.check(rollout)
        except BaseException:
            asked.cancel()
            raise
        self._asked = rollout.tokens, asked
        return rollout

    def _forget(self) -> None:
        if self._asked is not None:
            self._asked[1].cancel()
        self._asked = None

    def of_rollout(self, rollout: Rollout) -> Scores:
        """Compute the scores of each response, or of each of its tokens.

        With ``reads_trunk``, the rollout must have a whole trunk, or none.
        """
        if self._asked is None or self._asked[0] is not rollout.tokens:
            return self._of_rollout(rollout, self._calls)
        try:
            return self._of_rollout(rollout, self._calls | self._asked[1].calls)
        finally:
            self._forget()  # a second time it asks anew, as rewards may draw

    def _of_rollout(self, rollout: Rollout, calls: Mapping[str, Any]) -> Scores:
        columns = rollout.columns | _always(rollout) if self.functions else {}
        with self._resident():
            found = {
                name: score(
                    one,
                    rollout.tokens,
                    rollout.prompts,
                    rollout.completions,
                    max_tokens=self.max_tokens,
                    passes=self._passes[name],
                    trunk_states=self._trunk_states(name, rollout),
                    columns=columns,
                )
                for name, one in calls.items()
            }
        parts: dict[str, Tensor] = {}
        for name, scores in found.items():
            parts |= {f"{name}/{k}" if k else name: v for k, v in scores.parts.items()}
        _check_judged(torch.stack([parts[name] for name in found]), rollout.prompts)
        totals = [self.weights[name] * scores.total for name, scores in found.items()]
        return Scores(_sum(totals, rollout.tokens), parts)

    def _trunk_states(self, name: str, rollout: Rollout) -> TrunkStates | None:
        """Return the trunk states, for a reward that starts from them."""
        passes = self._passes[name]
        return rollout.trunk_states if passes is not None and passes.split else None

    def of_tokens(
        self,
        tokens: Tokens,
        prompts: list[str],
        completions: list[str],
        examples: list[Example] | None = None,
    ) -> Scores:
        """Compute the same from tokens, texts and the columns of ``examples``."""
        ended = torch.ones(len(tokens), dtype=torch.bool, device="cpu")
        rollout = Rollout(
            tokens,
            None,
            None,
            ended,
            Sampling(1),
            prompts=prompts,
            completions=completions,
            examples=examples or [],
        )
        return self.of_rollout(rollout)


def named_rewards(reward: Any, weights: Sequence[float] = ()) -> dict[str, Any]:
    """Return the rewards by name, and check them and their weights."""
    if isinstance(reward, Mapping):
        rewards = dict(reward)
        for name in rewards:
            if not isinstance(name, str) or not name or "/" in name:
                raise ValueError(
                    f"reward: got the name {name!r}, expected a text without '/', which parts two "
                    "names of metrics"
                )
    else:
        several = reward if isinstance(reward, (list, tuple)) else [reward]
        rewards = {}
        for one in several:
            name, number = name_of(one), 2
            while name in rewards:
                name, number = f"{name_of(one)}_{number}", number + 1
            rewards[name] = one
    if not rewards:
        raise ValueError("reward: got no reward, expected at least one")
    for name, one in rewards.items():
        check_reward_model(one)
        if not isinstance(one, nn.Module):
            check_arity(_callable_at_once(one), f"reward_model {name}")
    if weights and len(weights) != len(rewards):
        raise ValueError(
            f"reward_weights: got {len(weights)} weights for {len(rewards)} rewards "
            f"({', '.join(rewards)}), expected one each"
        )
    return rewards


def _model_of(reward: Any) -> Any:
    """Return a reward that is a module, the model of one that has one, or of its judge."""
    if isinstance(reward, nn.Module):  # a transformers classifier has a body called model
        return reward
    return getattr(getattr(reward, "judge", reward), "model", reward)


def without_wrapper(reward: Any) -> Any:
    """Return the object of an AsyncReward, whose own methods matter; any other reward as it is."""
    return reward.function if isinstance(reward, AsyncReward) else reward


def _callable_at_once(reward: Any) -> Any:
    """Return an async function wrapped so that it can be called on a batch."""
    is_module = isinstance(reward, nn.Module)
    return AsyncReward(reward) if not is_module and is_async(reward) else reward


def _passes(reward: Any, policy: LanguageModel) -> Passes | None:
    """Return the passes of a RewardModel, put on the policy's trunk if it can be; None: of others.

    It may live on another device.
    """
    if not isinstance(reward, nn.Module):
        return None
    weight = next(reward.parameters(), None)
    here = weight is None or weight.device == policy.device
    split = put_on_trunk(reward, policy) if here else None
    return head_passes(reward, split, padding_free=policy.padding_free)


def _always(rollout: Rollout) -> dict[str, Any]:
    """Return what rewards can ask for whatever the data has."""
    tokens = rollout.tokens
    pairs = zip(tokens.response_ids.tolist(), tokens.response_lengths.tolist(), strict=True)
    return {
        "messages": rollout.messages,
        "completion_ids": [ids[:length] for ids, length in pairs],
        "tokens": tokens,
    }


def _check_judged(parts: Tensor, prompts: Sequence[str]) -> None:
    for prompt, none in zip(prompts, parts.isnan().all(0).tolist(), strict=True):
        if none:
            raise ValueError(
                f"reward: no reward judges the response to the prompt {prompt!r}: all returned "
                "None; give it a number"
            )


def _sum(totals: Sequence[Tensor], tokens: Tokens) -> Tensor:
    """Add scores [B] or [B, T]; with the latter, the former stand on each response's last token."""
    if len({total.dim() for total in totals}) == 1:
        return torch.stack(list(totals)).sum(0)
    last = tokens.last_trained.to(tokens.device)[:, None]
    placed = [
        total
        if total.dim() == 2
        else total.new_zeros(tokens.response_ids.shape).scatter(1, last, total[:, None])
        for total in totals
    ]
    return torch.stack(placed).sum(0)
