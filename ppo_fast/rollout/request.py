"""Request: prompts to decode, and how each response is drawn and ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ppo_fast.data.sampling import Sampling
from ppo_fast.rollout.stops import Stops

PromptIds = tuple[int, ...]


class Request(NamedTuple):
    """Prompts to decode, and how each response is drawn and ends. Legend: B sequences.

    prompts: B prompts, none empty.
    sampling: the distribution drawn from.
    stops: decides where a response ends.
    seeds: [B] int64.
    max_lengths: B numbers, the max tokens of each response.
    slots: max sequences decoded at a time.
    pad_id: id at padded positions.
    """

    prompts: list[PromptIds]
    sampling: Sampling
    stops: Stops
    seeds: Tensor
    max_lengths: Sequence[int]
    slots: int
    pad_id: int
