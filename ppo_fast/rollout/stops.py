"""Stops: decides where a response ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ppo_fast.data.sampling import Sampling


class Stops:
    """Decides where a response ends.

    Args:
        sampling: its stop tokens, stop strings and ``min_new_tokens``.
        eos_ids: further ids that end a response.
        to_text: ids -> text, for stop strings.

    Raises:
        ValueError: stop strings without ``to_text``.
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
        # A token that is not special has at least one byte; the last may complete a character.
        self._tail = max((len(s.encode()) for s in self._strings), default=0) + 8

    def ends(self, response: list[int]) -> bool:
        """Return whether ``response`` ends with its last token."""
        if response[-1] in self.ids:
            return True
        if not self._strings or len(response) < self._least:
            return False
        assert self._to_text is not None
        tail = response[-self._tail :]
        text = self._to_text(tail)
        if not any(string in text for string in self._strings):
            return False
        # completed by this token, not before it; the last character may have been incomplete
        before = _common_prefix(text, self._to_text(tail[:-1]))
        return any(text.find(s, max(before - len(s) + 1, 0)) >= 0 for s in self._strings)


def _common_prefix(one: str, other: str) -> int:
    """Return the length of the longest text that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(one), len(other)))
