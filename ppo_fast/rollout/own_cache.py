"""Decoding with a model's own cache, for layers that keep more than keys and values by token.

Hybrids and state-space models keep states that have seen every token before them, and some layers
share what others keep, so that rows of unequal lengths cannot stand in one cache. Here sequences
are decoded together whose prompts have equal lengths, without padding, until all have ended. A
model without a cache, or whose cache gives other logits, computes all tokens anew at every step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ppo_fast.data.rollout import Rollout
from ppo_fast.data.sampling import Sampling
from ppo_fast.data.tokens import make_tokens
from ppo_fast.models.language_model import LanguageModel, NotFiniteError
from ppo_fast.models.probe import relative_difference
from ppo_fast.models.transformers_internals import next_with_own_cache, output_of
from ppo_fast.rollout.draw import NOT_FINITE, draw
from ppo_fast.rollout.speedups.cuda_graphs import first_line
from ppo_fast.rollout.speedups.slot_check import check_layers
from ppo_fast.rollout.stops import Stops

ERRORS = (
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    LookupError,
    AssertionError,
)


class OwnCache(NamedTuple):
    """How a model decodes that does not decode by slots.

    why_no_slots: reason why it does not.
    why_no_cache: reason why it decodes without any cache, all tokens anew at every step; None: it
        has a cache.
    """

    why_no_slots: str
    why_no_cache: str | None


_own: WeakKeyDictionary[LanguageModel, OwnCache | None] = WeakKeyDictionary()


@torch.no_grad()
def own_cache(model: LanguageModel) -> OwnCache | None:
    """Return None if the model decodes by slots; otherwise why not, and whether it has a cache.

    Remembered per model, which is in eval mode.
    """
    if model not in _own:
        try:
            check_layers(model)
            _own[model] = None
        except (NotFiniteError, torch.OutOfMemoryError):
            raise
        except ERRORS as error:
            _own[model] = OwnCache(_words(error), _own_cache_fails(model))
    return _own[model]


def _words(error: Exception) -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{first_line(error)}".removeprefix("policy_model: ")


def _own_cache_fails(model: LanguageModel) -> str | None:
    """Return the reason why steps with the model's own cache cannot be used, or None."""
    ids = torch.tensor([[11, 15, 12, 17, 13, 14], [12, 18, 15, 11, 16, 17]], device=model.device)
    ids %= model.vocab_size
    expected = output_of(model.model, input_ids=ids, use_cache=False).logits
    try:
        found, cache = [], None
        for part in ids.split([3, 1, 1, 1], dim=1):
            logits, cache = next_with_own_cache(model.model, part, cache)
            found.append(logits)
    except ERRORS as error:
        return _words(error)
    difference = relative_difference(torch.stack(found, dim=1).float(), expected[:, 2:].float())
    if difference <= model.decoding_tolerance:
        return None
    return f"its logits differ by {difference:.1e} from those of one pass over all tokens"


@torch.no_grad()
def decode_with_own_cache(
    model: LanguageModel,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    stops: Stops,
    *,
    seeds: Tensor,
    slots: int,
    max_lengths: Sequence[int],
    pad_id: int,
) -> Rollout:
    """Sample a response for every prompt; the arguments are those of ``decode``.

    The model is in eval mode. The rollout has neither states nor trunk states.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for i, ids in enumerate(prompt_ids):
        groups[len(ids)].append(i)
    drawn = _Drawn(model, sampling, stops, seeds.to(model.device), max_lengths)
    for length in sorted(groups):
        for start in range(0, len(groups[length]), slots):
            rows = groups[length][start : start + slots]
            _decode_together(model, rows, [prompt_ids[i] for i in rows], drawn)
    tokens = make_tokens(prompt_ids, drawn.responses, pad_id, model.device)
    width, beyond = tokens.response_ids.shape[1], ~tokens.response_mask
    logprobs = drawn.logprobs[:, :, :width].masked_fill(beyond, 0.0)
    if not torch.isfinite(logprobs[0]).all():
        raise FloatingPointError(NOT_FINITE)
    finished = torch.tensor(drawn.finished, device="cpu")
    return Rollout(tokens, logprobs[0], logprobs[1], finished, sampling)


class _Drawn:
    """Tokens drawn so far and their log-probs, by sequence."""

    def __init__(
        self,
        model: LanguageModel,
        sampling: Sampling,
        stops: Stops,
        seeds: Tensor,
        max_lengths: Sequence[int],
    ) -> None:
        self.sampling, self.stops, self.seeds, self.max_lengths = (
            sampling,
            stops,
            seeds,
            max_lengths,
        )
        self.responses: list[list[int]] = [[] for _ in max_lengths]
        self.finished = [False] * len(max_lengths)
        self.logprobs = torch.zeros(
            2, len(max_lengths), max(max_lengths), dtype=torch.float32, device=model.device
        )
        self.ends = torch.zeros(model.vocab_size, dtype=torch.bool, device=model.device)
        self.ends[[i for i in stops.ids if i < model.vocab_size]] = True

    def draw(self, rows: list[int], position: int, logits: Tensor) -> Tensor:
        """Draw the tokens [n] at ``position`` of the responses of sequences ``rows``."""
        positions = torch.full((len(rows),), position, device=logits.device)
        sampled = draw(logits, self.seeds[rows], positions, self.sampling, self.ends)
        self.logprobs[0, rows, position] = sampled.logprobs.float()
        self.logprobs[1, rows, position] = sampled.sampling_logprobs.float()
        for i, token in zip(rows, sampled.tokens.tolist(), strict=True):
            if not self.ended(i):
                self.responses[i].append(token)
                self.finished[i] = self.stops.ends(self.responses[i])
        return sampled.tokens

    def ended(self, i: int) -> bool:
        return self.finished[i] or len(self.responses[i]) == self.max_lengths[i]


def _decode_together(
    model: LanguageModel, rows: list[int], prompts: Sequence[Sequence[int]], drawn: _Drawn
) -> None:
    """Decode sequences ``rows``, whose prompts have equal lengths, until the last has ended."""
    ids, cache = torch.tensor([list(prompt) for prompt in prompts], device=model.device), None
    own = own_cache(model)
    assert own is not None
    for position in range(max(drawn.max_lengths[i] for i in rows)):
        if own.why_no_cache is None:
            logits, cache = next_with_own_cache(model.model, ids, cache)
        else:
            logits, _ = next_with_own_cache(model.model, ids, None, use_cache=False)
        tokens = drawn.draw(rows, position, logits)[:, None]
        if all(map(drawn.ended, rows)):
            return
        ids = tokens if own.why_no_cache is None else torch.cat([ids, tokens], dim=1)
