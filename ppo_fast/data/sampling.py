"""Sampling: how responses are drawn, and where they end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: at most ``max_length`` tokens each, from softmax(logits /
    temperature), cut to the ``top_k`` likeliest tokens (0: all) and to the likeliest that hold
    ``top_p`` of the probability (1: all). ``top_k=1`` is greedy decoding.

    A response ends with an EOS token, with one of ``stop_token_ids``, or with the token that
    completes one of ``stop_strings``; that token belongs to it. Its first ``min_new_tokens`` are
    drawn among tokens that end nothing (a stop string may still end it after them).
    """

    max_length: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def whole(name: str, least: int) -> bool:
            value = getattr(self, name)
            is_whole = isinstance(value, Integral) and not isinstance(value, bool)
            return is_whole and int(value) >= least

        def all_are(name: str, kind: type) -> bool:
            values = getattr(self, name)
            return isinstance(values, tuple) and all(isinstance(v, kind) for v in values)

        real = {n: isinstance(getattr(self, n), Real) for n in ("temperature", "top_p")}
        for name, ok, expected in (
            ("max_length", whole("max_length", 1), "a whole number >= 1"),
            ("temperature", real["temperature"] and 0 < self.temperature < math.inf, "above 0"),
            ("top_k", whole("top_k", 0), "0 (off) or more"),
            ("top_p", real["top_p"] and 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_new_tokens", whole("min_new_tokens", 0), "a whole number >= 0"),
            ("stop_token_ids", all_are("stop_token_ids", Integral), "token ids, (2, 13)"),
            ("stop_strings", all_are("stop_strings", str), 'texts, ("\\n\\n",)'),
        ):
            if not ok:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")
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
        """Whether tokens are drawn from another distribution than softmax(logits / t)."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_new_tokens > 0


class Stops:
    """Where a response ends.

    Args:
        sampling: its stop tokens and stop strings.
        eos_ids: further ids that end a response.
        to_text: ids -> text, for stop strings.
    """

    def __init__(
        self,
        sampling: Sampling,
        eos_ids: Sequence[int],
        to_text: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.ids = {*eos_ids, *sampling.stop_token_ids}
        self._strings, self._to_text = sampling.stop_strings, to_text
        self._least = sampling.min_new_tokens
        if self._strings and to_text is None:
            raise ValueError("stop_strings: need a tokenizer; pass one, or use stop_token_ids")
        # A token is a byte at least, but for special ones, and the last may complete a character.
        self._tail = max((len(s.encode()) for s in self._strings), default=0) + 8

    def ends(self, response: list[int]) -> bool:
        """Whether ``response`` ends with its last token."""
        if response[-1] in self.ids:
            return True
        if not self._strings or len(response) < self._least:
            return False
        assert self._to_text is not None
        tail = response[-self._tail :]
        text = self._to_text(tail)
        found = [string for string in self._strings if string in text]
        # completed by this token, not before it
        return bool(found) and any(s not in self._to_text(tail[:-1]) for s in found)
