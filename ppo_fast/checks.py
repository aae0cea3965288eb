"""Checks of numbers and words that users give: settings with a range, and counts.

A dataclass states beside each field what it allows, and ``check_fields`` checks it::

    gamma: float = number(1.0, at_least=0, at_most=1)
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import field, fields
from functools import wraps
from numbers import Integral, Rational, Real
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

LARGEST_WHOLE = 2**62  # of torch's sizes

# Arguments of TRL's PPOTrainer and PPOConfig, and what stands for them here.
TRL_NAMES = {
    "args": "config=PPOConfig(...)",
    "model": "policy_model",
    "ref_model": "reference_model",
    "processing_class": "tokenizer",
    "train_dataset": "the prompts of train()",
    "num_ppo_epochs": "num_epochs",
    "num_mini_batches": "num_minibatches",
    "kl_coef": "kl_penalty",
    "cliprange": "clip_epsilon",
    "cliprange_value": "value_clip",
    "vf_coef": "value_loss_coef",
    "lam": "gae_lambda",
    "response_length": "max_length",
    "stop_token_id": "stop_token_ids",
    "per_device_train_batch_size": "microbatch_tokens, and batch_size of train()",
    "gradient_accumulation_steps": "microbatch_tokens",
    "max_steps": "num_steps of train()",
    "total_episodes": "num_steps of train()",
    "output_dir": "checkpoint_dir of train()",
    "local_rollout_forward_batch_size": "forward_batch_tokens",
    "whiten_rewards": "reward_normalization, which is over scores",
    "bf16": "compute_dtype='bfloat16'",
}


def with_names_checked(init: Callable[..., None]) -> Callable[..., None]:
    """Let an ``__init__`` raise TypeError for an unknown argument with the name that was meant."""
    known = [*inspect.signature(init).parameters][1:]

    @wraps(init)
    def checked(self: Any, *arguments: Any, **named: Any) -> None:
        for name in named.keys() - known:
            near = difflib.get_close_matches(name, known, 1)
            meant = TRL_NAMES.get(name) or (near[0] if near else None)
            hint = f"did you mean {meant}?" if meant else f"it takes {', '.join(known)}"
            raise TypeError(f"{type(self).__name__}: got an unknown argument {name!r}; {hint}")
        init(self, *arguments, **named)

    return checked


class Allowed(NamedTuple):
    """Test of a field's values, and a description of what it allows."""

    test: Callable[[Any], bool]
    words: str


def number(
    default: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
    or_inf: str = "",
    or_none: bool = False,
) -> Any:
    """Make a dataclass field for a finite number in a range.

    Args:
        default: its default.
        above, at_least, below, at_most: the ends of the range.
        or_inf: what infinity means, where that is allowed too.
        or_none: whether None is allowed too.
    """

    def test(value: Any) -> bool:
        if not isinstance(value, Real):
            return False
        try:
            x = float(value)
        except OverflowError:
            return False
        if not math.isfinite(x):
            return bool(or_inf) and x == math.inf
        return above < x and at_least <= x < below and x <= at_most

    words = f"a number{_range(above, at_least, below, at_most)}"
    words = words if words != "a number" else "a finite number"
    return _field(default, test, words + (f" (inf: {or_inf})" if or_inf else ""), or_none)


def whole(
    default: Any, *, at_least: int = 1, below: float = math.inf, or_none: bool = False
) -> Any:
    """Make a dataclass field for a whole number in a range; ``or_none``: or None."""

    def test(value: Any) -> bool:
        return is_whole(value) and at_least <= value < min(below, LARGEST_WHOLE)

    limit = f"2**{int(math.log2(below))}" if below < math.inf else ""
    words = f"in [{at_least}, {limit})" if limit else f">= {at_least}"
    return _field(default, test, f"a whole number {words}", or_none)


def tuple_of(default: Any, kind: type, words: str) -> Any:
    """Make a dataclass field for a tuple of ``kind``, which is a list in a config file."""

    def test(value: Any) -> bool:
        return isinstance(value, tuple) and all(isinstance(v, kind) for v in value)

    return _field(default, test, words, False)


def allowed(default: Any, test: Callable[[Any], bool], words: str) -> Any:
    """Make a dataclass field with a test of its own."""
    return _field(default, test, words, False)


def _field(default: Any, test: Callable[[Any], bool], words: str, or_none: bool) -> Any:
    if or_none:
        found = Allowed(lambda value: value is None or test(value), f"{words}, or None")
    else:
        found = Allowed(test, words)
    return field(default=default, metadata={"allowed": found})


def _range(above: float, at_least: float, below: float, at_most: float) -> str:
    low, high = max(above, at_least), min(below, at_most)
    if low == -math.inf and high == math.inf:
        return ""
    if high == math.inf:
        return f" above {low:g}" if above > at_least else f" >= {low:g}"
    return (
        f" in {'(' if above > at_least else '['}{low:g}, {high:g}{']' if at_most < below else ')'}"
    )


def check_fields(settings: Any) -> None:
    """Check a dataclass's values against what its fields allow.

    A field of a Literal type, or of bool, allows the values that its type names. Lists become
    tuples where a tuple is expected, and numbers of numpy become Python's.

    Raises:
        ValueError: a value is not allowed; it names the field, the value and what is allowed.
    """
    hints = get_type_hints(type(settings))
    for item in fields(settings):
        value = plain_numbers(getattr(settings, item.name))
        if isinstance(value, list) and isinstance(item.default, tuple):
            value = tuple(value)
        object.__setattr__(settings, item.name, value)
        found = item.metadata.get("allowed") or _choices(hints[item.name])
        if found is not None and not found.test(value):
            raise ValueError(f"{item.name}: got {value!r}, expected {found.words}")


def plain_numbers(value: Any) -> Any:
    """Return ``value`` with numpy's numbers as Python's, and fractions, which torch does not take,
    as floats; in lists, tuples and dicts too."""
    if isinstance(value, dict):
        return {plain_numbers(key): plain_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain_numbers(item) for item in value)
    if isinstance(value, Rational) and not isinstance(value, Integral):
        with suppress(OverflowError):  # beyond all ranges
            return float(value)
    is_number = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    return value.item() if is_number else value


def _choices(hint: Any) -> Allowed | None:
    """Return what a Literal, an optional Literal or bool allows; None for other types."""
    if hint is bool:
        return Allowed(lambda value: isinstance(value, bool), "True or False")
    optional = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
    parts = [part for part in get_args(hint) if part is not NoneType] if optional else [hint]
    if len(parts) != 1 or get_origin(parts[0]) is not Literal:
        return None
    values = (*((None,) if optional else ()), *get_args(parts[0]))
    return Allowed(
        lambda value: any(value is v or (isinstance(v, str) and value == v) for v in values),
        f"one of {values}",
    )


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite number; True and False are none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # of a whole number beyond those of float
        return False


def is_whole(value: Any) -> bool:
    """Return whether ``value`` is an integer, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_counts(**counts: Any) -> None:
    """Check that each count is a whole number of at least 1.

    Raises:
        ValueError: one is not.
    """
    for name, value in counts.items():
        if not is_whole(value) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a whole number of at least 1")
