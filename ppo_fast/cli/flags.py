"""Find the flag that a mistyped one was meant to be."""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass
from typing import get_type_hints


def check_flags(command: str, cls: type, arguments: list[str]) -> None:
    """Check that a command has the flags that it is given.

    Args:
        command: its name.
        cls: the dataclass of its flags, in which dataclasses may be nested.
        arguments: those after the command's name.

    Raises:
        ValueError: it has not; the nearest flag is named.
    """
    known = {"help", *_names(cls)}
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].replace("_", "-")
        if argument.startswith("--") and name and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            listed = f"ppo-fast {command} --help lists them"
            hint = f"did you mean --{near[0]}?" if near else listed
            raise ValueError(f"no flag --{name} of {command}; {hint}")


def _names(cls: type) -> set[str]:
    found, hints = set(), get_type_hints(cls)
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            found |= _names(hints[item.name])
            continue
        name = item.name.replace("_", "-")
        found |= {name, f"no-{name}"} if hints[item.name] is bool else {name}
    return found
