"""Users' code: which arguments a function takes, and where errors arose."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LIBRARY, PACKAGE = os.path.dirname(os.__file__), str(Path(__file__).parent)


class Parameters(NamedTuple):
    """Names of the arguments that a function takes.

    positional: names of parameters that can be given by position, in order.
    only_positional: those of them that cannot be given by name.
    names: of parameters that can be given by name.
    required: names of parameters without a default.
    args: whether it takes more by position, as ``*args``.
    any: whether it takes any other name, as ``**columns``.
    """

    positional: tuple[str, ...]
    only_positional: tuple[str, ...]
    names: tuple[str, ...]
    required: tuple[str, ...]
    args: bool
    any: bool

    @property
    def hidden(self) -> bool:
        """Whether it is ``(*args, **kwargs)``: a wrapper that hides what its function takes."""
        return self.args and self.any and not self.positional and not self.names


def parameters(function: Callable[..., Any]) -> Parameters:
    """Return what a function, or an object's ``__call__``, takes; anything if it does not say."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of functions in C
        return Parameters((), (), (), (), True, True)
    positional = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    single = [*positional, *(p for p in found if p.kind == p.KEYWORD_ONLY)]
    return Parameters(
        tuple(p.name for p in positional),
        tuple(p.name for p in positional if p.kind == p.POSITIONAL_ONLY),
        tuple(p.name for p in single if p.kind != p.POSITIONAL_ONLY),
        tuple(p.name for p in single if p.default is p.empty),
        any(p.kind == p.VAR_POSITIONAL for p in found),
        any(p.kind == p.VAR_KEYWORD for p in found),
    )


def arguments(
    function: Callable[..., Any], first: Sequence[Any], columns: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and the named arguments of a call: ``first``, then what it takes.

    Of ``columns`` it takes those whose names its other parameters have, or all with ``**columns``.
    """
    found, count = parameters(function), len(first)
    given = list(first)
    for name in found.only_positional[count:]:
        if name not in columns:
            break
        given.append(columns[name])
    if found.hidden:
        return given, {}
    # a method that takes any name has one called self
    others = {*found.positional[:count], *found.only_positional, "self"}
    named = {k: v for k, v in columns.items() if k not in others}
    return given, {k: v for k, v in named.items() if found.any or k in found.names}


def lacking(function: Callable[..., Any], first: int, columns: Collection[str]) -> list[str]:
    """Return the parameters without a default, after the ``first`` ones, that no column fills."""
    found = parameters(function)
    return [n for n in found.required if n not in found.positional[:first] and n not in columns]


def taken(
    function: Callable[..., Any], columns: Mapping[str, Any], *, positional: int = 0
) -> dict[str, Any]:
    """Return the columns that a function takes by name, after its ``positional`` first ones."""
    return arguments(function, [None] * positional, columns)[1]


def raised_here(error: BaseException) -> bool:
    """Return whether code of this package raised an error itself."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(PACKAGE)


def place_of_error(error: BaseException) -> str:
    """Return the file and line of the user's code in which an error arose, to be appended."""
    others = (LIBRARY, PACKAGE, "<frozen")
    frames = traceback.extract_tb(error.__traceback__)
    names = [(f.filename, f.lineno) for f in frames if not f.filename.startswith(others)]
    own = [(name, line) for name, line in names if "site-packages" not in name]
    return f" ({own[-1][0]}:{own[-1][1]})" if own else ""
