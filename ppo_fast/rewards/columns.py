"""Helpers of rewards that read columns of the data: signatures, look-ups, names in errors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 60
"""Max characters of a prompt in an error."""


def signature_with(columns: Sequence[str | inspect.Parameter]) -> inspect.Signature:
    """Return the signature ``(prompts, completions, *, columns)``.

    ``inspect.signature`` of an object gives its ``__signature__``: who calls a reward sees there
    which columns it takes.
    """
    kind = inspect.Parameter
    texts = [kind(name, kind.POSITIONAL_OR_KEYWORD) for name in ("prompts", "completions")]
    named = [kind(c, kind.KEYWORD_ONLY) if isinstance(c, str) else c for c in columns]
    return inspect.Signature([*texts, *named])


def column(columns: Mapping[str, Any], name: str, who: str) -> Any:
    """Return a column, or raise ValueError that ``who`` lacks it."""
    if name not in columns:
        known = ", ".join(columns) or "none"
        raise ValueError(f"{who}: got no column {name!r} of the data (there are: {known})")
    return columns[name]


def for_prompt(prompt: str) -> str:
    """Return words that name a prompt in an error, shortened."""
    return f"the prompt {prompt[:SHOWN] + ('...' if len(prompt) > SHOWN else '')!r}"
