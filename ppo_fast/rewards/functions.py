"""Call Python functions as rewards, with the columns of the data that they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ppo_fast.user_code import arguments, lacking, parameters, place_of_error, raised_here

# f(prompts, completions, **columns) -> a list of numbers, or a mapping of such lists
RewardFunction = Callable[..., Sequence[float | None] | Mapping[str, Sequence[float | None]]]

# Names that a reward function can take besides the columns of the data.
ALWAYS = ("messages", "completion_ids", "tokens")
TEXTS = ("prompts", "completions")


def call_function(
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: Mapping[str, Any],
    what: str,
) -> Any:
    """Return what ``function`` gives for these responses.

    It gets prompts and completions by position, or by name where ``completions`` is a parameter of
    it, and of the columns those that it names, or all where it has ``**columns``.

    Raises:
        ValueError: it wants a column that there is not.
        RuntimeError: it raised (chained).
    """
    missing = missing_columns(function, columns)
    if missing:
        raise ValueError(missing_message(what, missing, columns))
    scores: Any
    try:
        given, named = given_to(function, prompts, completions, columns)
        scores = function(*given, **named)
        scores = list(scores) if isinstance(scores, Iterator) else scores  # it may raise here
    except (Exception, SystemExit) as error:
        if isinstance(error, (RuntimeError, TimeoutError, ValueError)) and raised_here(error):
            raise  # by a reward of this package, which names itself
        raised = f"{what} raised {type(error).__name__}: {error}"
        raise RuntimeError(f"{raised}{place_of_error(error)}") from error
    if inspect.iscoroutine(scores) or inspect.isasyncgen(scores):
        if inspect.iscoroutine(scores):
            scores.close()
        raise TypeError(
            f"{what}: returned a {type(scores).__name__}; define it by async def, with a return"
        )
    return scores


def given_to(
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: Mapping[str, Any],
) -> tuple[list[Any], dict[str, Any]]:
    """Return what ``function`` is given by position and by name: copies, which it may change."""
    texts = {"prompts": prompts, "completions": completions}
    others = {name: column for name, column in columns.items() if name not in TEXTS}
    if _by_name(function):
        given, named = arguments(function, (), texts | others)
    else:
        given, named = arguments(function, [*texts.values()], others)
    return _copied(given), _copied(named)


def _copied(column: Any) -> Any:
    """Return a copy of lists and dicts; other things within are the same."""
    if isinstance(column, list):
        return [_copied(item) for item in column]
    return {k: _copied(v) for k, v in column.items()} if type(column) is dict else column


def check_arity(function: Any, what: str) -> None:
    """Raise TypeError if a function takes neither prompts and completions nor ``completions``."""
    found = parameters(function)
    if _by_name(function) or found.args or len(found.positional) >= len(TEXTS):
        return
    raise TypeError(
        f"{what}: takes {', '.join(found.positional) or 'nothing'} by position, expected prompts "
        "and completions: f(prompts, completions)"
    )


def missing_columns(function: Any, columns: Collection[str]) -> list[str]:
    """Return the columns that a reward wants and ``columns`` lacks."""
    known = {*columns, *ALWAYS, *TEXTS}
    needs = getattr(function, "needs", ())
    wanted = [needs] if isinstance(needs, str) else list(needs)
    first = 0 if _by_name(function) else len(TEXTS)
    return list(dict.fromkeys([*lacking(function, first, known), *(set(wanted) - known)]))


def takes(function: Any, column: str) -> bool:
    """Return whether a reward is given a column of this name."""
    first = () if _by_name(function) else TEXTS
    return column in arguments(function, first, {column: None})[1]


def missing_message(what: str, missing: Sequence[str], columns: Collection[str]) -> str:
    """Return the error for columns that the data lacks."""
    known = ", ".join(str(name) for name in columns if name not in ALWAYS) or "none"
    return (
        f"{what}: takes the column {missing[0]!r}, which the data lacks (its columns beside the "
        f"prompt: {known}); add it to the rows of the prompts, or give the parameter a default"
    )


def name_of(reward: Any) -> str:
    """Return a reward's ``name``, or that of its function or class."""
    own = getattr(reward, "name", None)
    if isinstance(own, str) and own:
        return own
    reward = reward.func if isinstance(reward, partial) else reward
    return getattr(reward, "__name__", type(reward).__name__)


def _by_name(function: Any) -> bool:
    """Return whether prompts and completions are passed by name, as some other trainers do."""
    found = parameters(function)
    return "completions" in found.names or (found.any and not found.args and not found.positional)
