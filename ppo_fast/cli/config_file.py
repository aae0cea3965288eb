"""Read the YAML file of ``--config``: defaults of ``ppo-fast train``."""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ppo_fast.cli.train import Train
from ppo_fast.config import PPOConfig

WORDS = {Path: "a path", str: "a text", int: "a whole number", bool: "true or false"}


def config_defaults(arguments: list[str]) -> Train | None:
    """Return Train's defaults from the file after ``--config``; None without one."""
    if not arguments or arguments[0] != "train":
        return None
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--config" and (equals or i + 1 < len(arguments)):
            return read_config(Path(value if equals else arguments[i + 1]))
    return None


def read_config(path: Path) -> Train:
    """Read a YAML file of Train's and PPOConfig's fields.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not YAML, a key is no field (the nearest one is named), or a value is out
            of range or of another type.
    """
    settings = _settings(path)
    run_fields = {f.name for f in fields(Train)} - {"ppo"}
    ppo_fields = set(asdict(PPOConfig()))
    for key in settings:
        if key not in run_fields | ppo_fields:
            near = difflib.get_close_matches(str(key), run_fields | ppo_fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            where = f"{path}{_line_of(key, path)}"
            raise ValueError(f"--config: {where} sets {key!r}, which is no flag{hint}")
    try:
        run = {k: _run_value(k, v) for k, v in settings.items() if k in run_fields}
        ppo = PPOConfig(**{k: _number(v) for k, v in settings.items() if k in ppo_fields})
    except ValueError as error:
        name = re.match(r"\w*", str(error))
        where = f"{path}{_line_of(name[0] if name else '', path)}"
        raise ValueError(f"--config: {where}: {error}") from error
    return replace(Train(**run | {"config": path}), ppo=ppo)


def _line_of(key: Any, path: Path) -> str:
    """Return " line N", where a file has this key at its top; "" if it has not."""
    tree = yaml.compose(path.read_text("utf-8"))
    pairs = tree.value if isinstance(tree, yaml.MappingNode) else ()
    lines = [name.start_mark.line + 1 for name, _ in pairs if name.value == str(key)]
    return f" line {lines[0]}" if lines else ""


def _settings(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"--config: no file {path}")
    try:
        settings = yaml.safe_load(path.read_text("utf-8")) or {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"--config: {path}{where} is not YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config: {path} holds no mapping of names to values")
    return settings


def _run_value(name: str, value: Any) -> Any:
    """Return the value of one of Train's fields in its type.

    Raises:
        ValueError: it is of another type.
    """
    hint = get_type_hints(Train)[name]
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return None
    kind = kinds[0]
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        none = ", or null" if NoneType in kinds else ""
        raise ValueError(f"{name}: got {value!r}, expected one of {get_args(kind)}{none}")
    if get_origin(hint) is tuple:  # of texts
        values = value if isinstance(value, (list, tuple)) else [value]
        if all(isinstance(item, str) for item in values):
            return tuple(values)
        raise ValueError(f"{name}: got {value!r}, expected a text or a list of texts")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in (str, Path) and (isinstance(value, str) or is_number):
        return kind(str(value))  # a folder may be called 1
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    none = ", or null" if NoneType in kinds else ""
    raise ValueError(f"{name}: got {value!r}, expected {WORDS[kind]}{none}")


def _number(value: Any) -> Any:
    """Convert a text to a number: YAML reads 1e-5, which has no dot, as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
