"""Preference pairs as tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.rewards.encoding import Encoder, Row, TooLong
from ppo_fast.rewards.fit.pairs import Pair, Response

logger = logging.getLogger(__name__)


class PairTokens(NamedTuple):
    """Tokenised pairs.

    chosen, rejected: n rows each.
    margins: [n] float32.
    lengths: [n] int64, tokens of the longer response of each pair, with its prompt.
    """

    chosen: list[Row]
    rejected: list[Row]
    margins: Tensor
    lengths: Tensor

    def select(self, indices: Sequence[int]) -> PairTokens:
        """Return some of the pairs."""
        chosen, rejected = ([side[i] for i in indices] for side in (self.chosen, self.rejected))
        index = torch.tensor(indices, dtype=torch.int64, device="cpu")
        return PairTokens(chosen, rejected, self.margins[index], self.lengths[index])


def encode_pairs(encoder: Encoder, pairs: Sequence[Pair], name: str = "pairs") -> PairTokens:
    """Tokenise pairs; one warning says of how many texts the beginning of the prompt was cut.

    Raises:
        ValueError: a response alone is too long, or the chat template refuses a chat; the pair's
            index is named, after ``name``.
    """
    chosen, cut = _encode(encoder, [pair.chosen for pair in pairs], name, "chosen")
    rejected, also_cut = _encode(encoder, [pair.rejected for pair in pairs], name, "rejected")
    if cut + also_cut:
        logger.warning(
            "%s: of %d of %d texts the beginning of the prompt is cut, to max_length %d tokens",
            name,
            cut + also_cut,
            2 * len(pairs),
            encoder.max_length,
        )
    both = zip(chosen, rejected, strict=True)
    lengths = [max(len(one["input_ids"]), len(other["input_ids"])) for one, other in both]
    margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float32, device="cpu")
    return PairTokens(chosen, rejected, margins, torch.tensor(lengths, device="cpu"))


def _encode(
    encoder: Encoder, responses: list[Response], name: str, side: str
) -> tuple[list[Row], int]:
    try:
        return encoder.encode(
            [response.prompt for response in responses],
            [response.completion for response in responses],
            [response.messages for response in responses],
        )
    except TooLong as error:
        raise ValueError(
            f"{name}[{error.index}]: its {side} response has {error.tokens} tokens, and "
            f"max_length {encoder.max_length} leaves room for {error.room}; raise max_length, or "
            "leave the pair out"
        ) from error
