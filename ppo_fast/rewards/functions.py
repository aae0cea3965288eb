"""Call Python functions as rewards, with the columns of the data that they take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from ppo_fast.user_code import Parameters, parameters, place_of_error

# f(prompts, completions, **columns) -> a list of numbers, or a mapping of such lists
RewardFunction = Callable[..., Sequence[float | None] | Mapping[str, Sequence[float | None]]]

# What every reward can ask for besides the columns of the data.
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
    found = parameters(function)
    texts: dict[str, Any] = {"prompts": list(prompts), "completions": list(completions)}
    try:
        if _by_name(found):
            named = texts | dict(columns)
            scores = function(**{k: v for k, v in named.items() if found.any or k in found.names})
        else:
            rest = {k: v for k, v in columns.items() if k in _after_texts(found) or found.any}
            scores = function(*texts.values(), **rest)
        return list(scores) if isinstance(scores, Iterator) else scores  # it may raise here
    except (Exception, SystemExit) as error:
        raised = f"{what} raised {type(error).__name__}: {error}"
        raise RuntimeError(f"{raised}{place_of_error(error)}") from error


def missing_columns(function: Any, columns: Collection[str]) -> list[str]:
    """Return the columns that a reward wants and ``columns`` lacks."""
    found = parameters(function)
    wanted = [name for name in found.required if name not in TEXTS]
    if not _by_name(found):
        wanted = [name for name in _after_texts(found) if name in found.required]
    wanted += [name for name in getattr(function, "needs", ()) if name not in wanted]
    return [name for name in wanted if name not in columns and name not in ALWAYS]


def missing_message(what: str, missing: Sequence[str], columns: Collection[str]) -> str:
    """Return the error for columns that the data lacks."""
    known = ", ".join(name for name in columns if name not in ALWAYS) or "none"
    return (
        f"{what}: takes the column {missing[0]!r}, which the data lacks (its columns beside the "
        f"prompt: {known}); add it to the rows of the prompts, or give the parameter a default"
    )


def name_of(reward: Any) -> str:
    """Return a reward's ``name``, or that of its function or class."""
    own = getattr(reward, "name", None)
    return (
        own if isinstance(own, str) and own else getattr(reward, "__name__", type(reward).__name__)
    )


def _by_name(found: Parameters) -> bool:
    return "completions" in found.names or (found.any and not found.names)


def _after_texts(found: Parameters) -> tuple[str, ...]:
    """Return the parameters after the two that take prompts and completions by position."""
    return found.names[2:]
