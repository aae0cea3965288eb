"""Sampling: how responses are drawn, and where they end."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from numbers import Integral

from ppo_fast.checks import check_fields, number, tuple_of, whole


@dataclass(frozen=True)
class Sampling:
    """Settings of how responses are drawn, and where they end.

    A response has at most ``max_length`` tokens. They are drawn from softmax(logits / temperature),
    cut to the ``top_k`` likeliest tokens (0: all) and to the likeliest that hold ``top_p`` of the
    probability (1: all). ``top_k=1`` is greedy decoding.

    A response ends with an EOS token, with one of ``stop_token_ids``, or with the token that
    completes one of ``stop_strings``; that token belongs to it. Its first ``min_new_tokens`` are
    drawn among tokens that end nothing (a stop string may still end it after them).
    """

    max_length: int = whole(MISSING)
    temperature: float = number(1.0, at_least=1e-10, at_most=1e10)  # 1 / it is a float32 too
    top_k: int = whole(0, at_least=0)
    top_p: float = number(1.0, above=0, at_most=1)
    min_new_tokens: int = whole(0, at_least=0)
    stop_token_ids: tuple[int, ...] = tuple_of((), Integral, "token ids, (2, 13)")
    stop_strings: tuple[str, ...] = tuple_of((), str, 'texts, ("\\n\\n",)')

    def __post_init__(self) -> None:
        check_fields(self)
        if "" in self.stop_strings:
            raise ValueError(
                f"stop_strings: got {self.stop_strings!r}, expected no empty text: every response "
                "contains it"
            )
        if self.min_new_tokens > self.max_length:
            raise ValueError(
                f"min_new_tokens: got {self.min_new_tokens}, expected at most "
                f"max_length={self.max_length}"
            )

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from another distribution than softmax(logits / temperature)."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_new_tokens > 0
