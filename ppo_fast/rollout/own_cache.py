"""Decoding with a model's own cache, for layers that keep more than keys and values by token.

Hybrids and state-space models keep states that have seen every token before them, and some layers
share what others keep, so that rows of unequal lengths cannot stand in one cache. Here sequences
are decoded together whose prompts have equal lengths, without padding. One that has ended leaves
the others, if the cache allows it. A model without a cache, or whose cache gives other logits,
computes all tokens anew at every step.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ppo_fast.data.rollout import Rollout
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.probe import relative_difference
from ppo_fast.models.transformers_internals import keep_rows, next_with_own_cache, output_of
from ppo_fast.nonfinite import NotFiniteError
from ppo_fast.rollout.draw import NOT_FINITE, draw
from ppo_fast.rollout.request import Request
from ppo_fast.rollout.speedups.cuda_graphs import first_line
from ppo_fast.rollout.speedups.slot_check import check_layers

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
    why_all_rows: reason why sequences that have ended are computed until the last has; None: they
        are not.
    """

    why_no_slots: str
    why_no_cache: str | None
    why_all_rows: str | None


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
            why_no_cache = _own_cache_fails(model)
            why_all_rows = None if why_no_cache else _own_cache_fails(model, drops_row=True)
            _own[model] = OwnCache(_words(error), why_no_cache, why_all_rows)
    return _own[model]


def _words(error: Exception) -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{first_line(error)}".removeprefix("policy_model: ")


def _own_cache_fails(model: LanguageModel, *, drops_row: bool = False) -> str | None:
    """Return the reason why steps with the model's own cache cannot be used, or None.

    With ``drops_row``, the first of two sequences leaves the cache in between.
    """
    ids = torch.tensor([[11, 15, 12, 17, 13, 14], [12, 18, 15, 11, 16, 17]], device=model.device)
    ids %= model.vocab_size
    expected = output_of(model.model, input_ids=ids, use_cache=False).logits
    try:
        found, cache = [], None
        for i, part in enumerate(ids.split([3, 1, 1, 1], dim=1)):
            if drops_row and i == 2:
                keep_rows(cache, torch.tensor([1], device=model.device))
            rows = slice(1, 2) if drops_row and i >= 2 else slice(0, 2)
            logits, cache = next_with_own_cache(model.model, part[rows], cache)
            found.append(logits[-1:] if drops_row else logits)
    except ERRORS as error:
        return _words(error)
    expected = expected[1:, 2:] if drops_row else expected[:, 2:]
    difference = relative_difference(torch.stack(found, dim=1).float(), expected.float())
    if difference <= model.decoding_tolerance:
        return None
    return f"its logits differ by {difference:.1e} from those of one pass over all tokens"


@torch.no_grad()
def decode_with_own_cache(model: LanguageModel, request: Request) -> Rollout:
    """Sample a response for every prompt.

    The model is in eval mode. The rollout has neither states nor trunk states.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for i, ids in enumerate(request.prompts):
        groups[len(ids)].append(i)
    drawn = _Drawn(model, request)
    for _, together in sorted(groups.items()):
        for start in range(0, len(together), request.slots):
            _decode_together(model, request, together[start : start + request.slots], drawn)
    tokens = request.tokens(drawn.responses, model.device)
    width, beyond = tokens.response_ids.shape[1], ~tokens.response_mask
    logprobs = drawn.logprobs[:, :, :width].masked_fill(beyond, 0.0)
    if not torch.isfinite(logprobs[0]).all():
        raise NotFiniteError(NOT_FINITE)
    finished = torch.tensor(drawn.finished, device="cpu")
    return Rollout(tokens, logprobs[0], logprobs[1], finished, request.sampling)


class _Drawn:
    """Tokens drawn so far and their log-probs, by sequence."""

    def __init__(self, model: LanguageModel, request: Request) -> None:
        self.request, count = request, len(request.prompts)
        self.responses: list[list[int]] = [[] for _ in range(count)]
        self.finished = [False] * count
        self.ended = [False] * count
        self.logprobs = torch.zeros(
            2, count, max(request.max_lengths), dtype=torch.float32, device=model.device
        )
        self.ends = torch.zeros(model.vocab_size, dtype=torch.bool, device=model.device)
        self.ends[[i for i in request.stops.ids if i < model.vocab_size]] = True

    def draw(self, rows: list[int], position: int, logits: Tensor) -> Tensor:
        """Draw the tokens [n] at ``position`` of the responses of sequences ``rows``."""
        positions = torch.full((len(rows),), position, device=logits.device)
        sampled = draw(
            logits, self.request.seeds[rows], positions, self.request.sampling, self.ends
        )
        self.logprobs[0, rows, position] = sampled.logprobs.float()
        self.logprobs[1, rows, position] = sampled.sampling_logprobs.float()
        tokens = sampled.tokens.tolist()
        for k, i in enumerate(rows):
            if not self.ended[i]:
                tokens[k], self.finished[i], self.ended[i] = self.request.note(
                    i, self.responses[i], tokens[k]
                )
        if self.request.turns is None:
            return sampled.tokens
        return torch.tensor(tokens, device=logits.device)  # a reply's tokens among them


def _decode_together(
    model: LanguageModel, request: Request, rows: list[int], drawn: _Drawn
) -> None:
    """Decode sequences ``rows``, whose prompts have equal lengths, until all have ended."""
    ids, cache = torch.tensor([request.prompts[i] for i in rows], device=model.device), None
    own = own_cache(model)
    assert own is not None
    for position in range(max(request.max_lengths[i] for i in rows)):
        if own.why_no_cache is None:
            logits, cache = next_with_own_cache(model.model, ids, cache)
        else:
            logits, _ = next_with_own_cache(model.model, ids, None, use_cache=False)
        tokens = drawn.draw(rows, position, logits)[:, None]
        ids = tokens if own.why_no_cache is None else torch.cat([ids, tokens], dim=1)
        going = [k for k, i in enumerate(rows) if not drawn.ended[i]]
        if not going:
            return
        if len(going) < len(rows) and own.why_all_rows is None:
            index = torch.tensor(going, device=model.device)
            rows, ids = [rows[k] for k in going], ids[index]
            if cache is not None:
                keep_rows(cache, index)
