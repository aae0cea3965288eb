"""Request: prompts to decode, and how each response is drawn and ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.data.rollout import per_token
from ppo_fast.data.sampling import Sampling
from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.rollout.stops import Stops
from ppo_fast.rollout.turns import Turns

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
    turns: the turns of the sequences, and what the environment replies; None: there is one turn.
    ended: called with the index and the ids of a sequence whose response has ended; None: it
        is not called.
    """

    prompts: list[PromptIds]
    sampling: Sampling
    stops: Stops
    seeds: Tensor
    max_lengths: Sequence[int]
    slots: int
    pad_id: int
    turns: Turns | None = None
    ended: Callable[[int, list[int]], None] | None = None

    def note(self, sequence: int, response: list[int], drawn: int) -> tuple[int, bool, bool]:
        """Append the next token of a sequence to its ``response``: ``drawn``, or a reply's.

        Returns that token, whether the response ends by itself, and whether it ends.
        """
        token, by_itself, ends = self._noted(sequence, response, drawn)
        if ends and self.ended is not None:
            self.ended(sequence, list(response))
        return token, by_itself, ends

    def _noted(self, sequence: int, response: list[int], drawn: int) -> tuple[int, bool, bool]:
        token = drawn if self.turns is None else self.turns.take(sequence, drawn)
        response.append(token)
        replying = self.turns is not None and self.turns.replying(sequence)
        ends = not replying and self.stops.ends(response)
        room = self.max_lengths[sequence] - len(response)
        if not ends or self.turns is None:
            return token, ends, ends or room == 0
        replies = self.turns.go_on(sequence, response, room)
        return token, replies is None, not replies

    def tokens(self, responses: list[list[int]], device: torch.device) -> Tokens:
        """Return the tokens of prompts and responses; replies are not trained on."""
        tokens = make_tokens(self.prompts, responses, self.pad_id, device)
        if self.turns is None:
            return tokens
        chosen = per_token("turns", self.turns.chosen, tokens).bool()
        return replace(tokens, trained=chosen)
