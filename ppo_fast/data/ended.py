"""A response that has ended, while others of its rollout are still sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Ended(NamedTuple):
    """A response that has ended. Its texts are those that the rollout will have.

    row: its index in the rollout.
    prompt, completion: texts.
    ids: all of its tokens, with the one that ended it.
    """

    row: int
    prompt: str
    completion: str
    ids: list[int]


OnEnd = Callable[[Ended], None]
