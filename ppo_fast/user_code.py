"""Users' code: which arguments a function takes, and where errors arose."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

LIBRARY, PACKAGE = os.path.dirname(os.__file__), str(Path(__file__).parent)


class Parameters(NamedTuple):
    """What a function can be given by name.

    names: of its parameters.
    required: those without a default.
    any: whether it takes any other name too, as ``**columns``.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]
    any: bool


def parameters(function: Callable[..., Any]) -> Parameters:
    """Return what a function, or an object's ``__call__``, takes; nothing if it does not say."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of functions in C
        return Parameters((), (), False)
    named = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Parameters(
        tuple(p.name for p in named),
        tuple(p.name for p in named if p.default is p.empty),
        any(p.kind == p.VAR_KEYWORD for p in found),
    )


def taken(
    function: Callable[..., Any], columns: Mapping[str, Any], *, positional: int = 0
) -> dict[str, Any]:
    """Return the columns that a function takes by name, after its ``positional`` first ones."""
    found = parameters(function)
    first = found.names[:positional]
    return {k: v for k, v in columns.items() if k not in first and (found.any or k in found.names)}


def place_of_error(error: BaseException) -> str:
    """Return the file and line of the user's code in which an error arose, to be appended."""
    others = (LIBRARY, PACKAGE, "<frozen")
    frames = traceback.extract_tb(error.__traceback__)
    names = [(f.filename, f.lineno) for f in frames if not f.filename.startswith(others)]
    own = [(name, line) for name, line in names if "site-packages" not in name]
    return f" ({own[-1][0]}:{own[-1][1]})" if own else ""
