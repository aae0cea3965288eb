"""Read the YAML file of ``--config``: defaults of ``ppo-fast train``."""

from __future__ import annotations

import difflib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ppo_fast.cli.train import Train
from ppo_fast.config import PPOConfig


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
        ValueError: a key that is no field (the nearest one is named), or a value out of range.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config: no file {path}")
    settings = yaml.safe_load(path.read_text("utf-8")) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"--config: {path} holds no mapping of names to values")
    run_fields = {f.name for f in fields(Train)} - {"ppo"}
    ppo_fields = set(asdict(PPOConfig()))
    for key in settings:
        if key not in run_fields | ppo_fields:
            near = difflib.get_close_matches(str(key), run_fields | ppo_fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--config: {path} sets {key!r}, which is no flag{hint}")
    paths = ("prompts", "output_dir")
    run: dict[str, Any] = {
        k: Path(v) if k in paths else v for k, v in settings.items() if k in run_fields
    }
    ppo: dict[str, Any] = {
        k: tuple(v) if k == "adam_betas" else _number(v)
        for k, v in settings.items()
        if k in ppo_fields
    }
    return replace(Train(**run | {"config": path}), ppo=PPOConfig(**ppo))


def _number(value: Any) -> Any:
    """Convert a text to a number: YAML reads 1e-5, which has no dot, as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
