"""Find and load the models that a command's flags name: a folder, or a name on the hub."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ppo_fast.hub import why_not_on_hub


def check_model(flag: str, model: str) -> None:
    """Check that ``model`` is a folder, or a name that the hub may have.

    transformers asks the hub for whatever is no folder, and where it cannot be reached asks again
    and again. One question here, before anything is loaded, finds a mistyped folder at once.

    Raises:
        FileNotFoundError: it is a path without a folder, or a name that the hub does not have; or
            the hub cannot be reached and has not been asked for this model before.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"--{flag}: the folder {model} holds no model: no config.json")
        return
    if path.exists():
        raise FileNotFoundError(f"--{flag}: {model} is a file, expected a model's folder")
    missing = f"--{flag}: no folder {model}{_nearest(path)}"
    if _is_path(model):
        raise FileNotFoundError(missing)
    if reason := why_not_on_hub(model):
        raise FileNotFoundError(f"{missing}, and {reason}")


def load_pretrained(flag: str, auto_class: Any, model: str, **options: Any) -> Any:
    """Return ``auto_class.from_pretrained(model, **options)``.

    Raises:
        ValueError: it cannot be loaded, for whatever reason (chained).
    """
    try:
        return auto_class.from_pretrained(model, **options)
    except Exception as error:  # files of many formats, read by several libraries
        raise ValueError(
            f"--{flag}: {model} cannot be loaded ({type(error).__name__}: {error})"
        ) from error


def _is_path(model: str) -> bool:
    """Return whether ``model`` cannot be a name on the hub: "name" or "organisation/name"."""
    path = Path(model)
    marked = model.startswith((".", "~")) or model.endswith(("/", "\\")) or "\\" in model
    in_folder = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
    return path.is_absolute() or len(path.parts) > 2 or marked or in_folder


def _nearest(path: Path) -> str:
    """Return a hint at the folder whose name is nearest, where there is one."""
    try:
        names = [other.name for other in path.parent.iterdir() if other.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, 1)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""
