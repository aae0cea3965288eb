"""Check whether steps may be captured as CUDA graphs, once per model, before it decodes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ppo_fast.data.sampling import Sampling
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout.decode import decode
from ppo_fast.rollout.own_cache import own_cache
from ppo_fast.rollout.speedups.cuda_graphs import (
    Capture,
    as_it_is,
    cuda_graphs,
    first_line,
    never_waiting,
)

# More prompts than slots, of different lengths: replays must follow rows that start, move and end.
PROMPTS = ((1, 5, 2, 7), (4,), (2, 8, 5), (6, 3), (9, 9))
MAX_LENGTHS = (7, 16, 3, 9, 12)
SLOTS = 4

_graphs: WeakKeyDictionary[LanguageModel, str | None] = WeakKeyDictionary()


# By type of device: how steps are captured, and how they run in the rehearsal before a capture.
CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": cuda_graphs}
REHEARSALS: dict[str, Callable[[torch.device], Capture]] = {"cuda": never_waiting}


def capture_for(model: LanguageModel) -> Capture | None:
    """Return what captures steps of ``model`` in one rollout, or None if they are not captured.

    They are captured if replaying them draws the same tokens as running them; if not, this warns.
    On the CPU nothing is captured.
    """
    captures = CAPTURES.get(model.device.type)
    if captures is None:
        return None
    if model not in _graphs and (reason := why_no_graphs(model)) is not None:
        warnings.warn(f"decoding runs without CUDA graphs: {reason}", stacklevel=2)
    return captures(model.device) if _graphs[model] is None else None


def why_no_graphs(model: LanguageModel) -> str | None:
    """Return the reason why steps are not captured, or None if they are. Remembered per model."""
    captures = CAPTURES.get(model.device.type)
    if captures is None:
        return f"the model is on {model.device}"
    if model not in _graphs:
        _graphs[model] = why_not(model, captures)
    return _graphs[model]


def why_not(model: LanguageModel, captures: Callable[[torch.device], Capture]) -> str | None:
    """Return the reason why steps cannot be captured, or None if they can."""
    weights = list(model.model.parameters())
    if len({weight.device for weight in weights}) > 1:
        return "the model's weights are on several devices"
    if any(type(weight.data) is not Tensor for weight in weights):
        return "the model's weights are distributed or quantised tensors"
    rehearsal = REHEARSALS.get(model.device.type, lambda _: as_it_is)
    try:
        expected = _tokens(model, rehearsal(model.device))
        if own_cache(model) is not None:
            return "it decodes with its own cache"
        found = _tokens(model, captures(model.device))
    except RuntimeError as error:  # what CUDA says of a call that cannot be captured
        return first_line(error)
    return None if torch.equal(found, expected) else "the replayed steps drew other tokens"


def _tokens(model: LanguageModel, capture: Capture) -> Tensor:
    vocab_size = model.vocab_size
    return decode(
        model,
        [[token % vocab_size for token in prompt] for prompt in PROMPTS],
        Sampling(max(MAX_LENGTHS)),
        seeds=torch.arange(len(PROMPTS), device="cpu"),
        eos_ids=[],
        pad_id=0,
        slots=SLOTS,
        max_lengths=MAX_LENGTHS,
        capture=capture,
    ).tokens.response_ids
