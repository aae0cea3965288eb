"""Turns: between them, a Python environment replies to what the policy wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from ppo_fast.checks import is_whole
from ppo_fast.user_code import place_of_error

Encode = Callable[[str], list[int]]
ToText = Callable[[list[int]], str]


class Turn(NamedTuple):
    """A turn of the policy: the text and the tokens that it wrote.

    text: as completions are: without the token that ended the turn.
    ids: all tokens, with the one that ended the turn.
    """

    text: str
    ids: list[int]


class Environment(Protocol):
    """Replies to the policy's turns, in one sequence."""

    def reply(self, turn: Turn) -> str | Sequence[int] | None:
        """Return what follows the turn, as text or token ids; None: the response ends here.

        A text is tokenised without special tokens: it writes those that a chat's format needs.
        """
        ...


class Turns:
    """The turns of a rollout's sequences.

    Args:
        environments: one per sequence.
        encode: text -> ids, without special tokens.
        to_text: ids of a turn -> its text.
        vocab_size: number of the policy's tokens.
    """

    def __init__(
        self,
        environments: Sequence[Environment],
        *,
        encode: Encode,
        to_text: ToText,
        vocab_size: int,
    ) -> None:
        self._environments, self._encode, self._to_text = environments, encode, to_text
        self._vocab_size = vocab_size
        self._replies: list[list[int]] = [[] for _ in environments]  # what is not yet read
        self._begins = [0] * len(environments)  # first token of the current turn
        self.chosen: list[list[bool]] = [[] for _ in environments]  # by the policy, each token

    def take(self, sequence: int, drawn: int) -> int:
        """Return the next token of a response: of a reply, if there is one, or else ``drawn``."""
        reply = self._replies[sequence]
        self.chosen[sequence].append(not reply)
        if not reply:
            return drawn
        token = reply.pop(0)
        self._begins[sequence] = len(self.chosen[sequence])
        return token

    def replying(self, sequence: int) -> bool:
        """Return whether the response's last token is a reply's."""
        return not self.chosen[sequence][-1]

    def go_on(self, sequence: int, response: list[int], room: int) -> bool | None:
        """Ask for a reply to a turn that has ended.

        Returns whether the response goes on; it is cut off where ``room`` tokens hold no more than
        the reply. None: there is no reply.

        Raises:
            RuntimeError: the environment raised (chained).
            TypeError, ValueError: its reply is no text and no ids, or is empty.
        """
        ids = response[self._begins[sequence] :]
        environment = self._environments[sequence]
        what = f"environment {type(environment).__name__}"
        try:
            reply = environment.reply(Turn(self._to_text(ids), ids))
        except Exception as error:  # whatever the user's code raises
            raised = f"{what} raised {type(error).__name__}: {error}"
            raise RuntimeError(f"{raised}{place_of_error(error)}") from error
        if reply is None:
            return None
        found = self._checked(reply, what)
        if len(found) >= room:
            return False
        self._replies[sequence] = found
        return True

    def _checked(self, reply: Any, what: str) -> list[int]:
        ids = self._encode(reply) if isinstance(reply, str) else reply
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(ids, (list, tuple)) or not all(map(is_whole, ids)):
            raise TypeError(f"{what}: replied {reply!r}, expected a text, a list of ids or None")
        if not ids:
            raise ValueError(f"{what}: its reply is empty; None ends the response")
        if not 0 <= min(ids) <= max(ids) < self._vocab_size:
            raise ValueError(
                f"{what}: its reply holds ids from {min(ids)} to {max(ids)}, expected 0 to "
                f"{self._vocab_size - 1}, the policy's vocabulary"
            )
        return [int(token) for token in ids]
