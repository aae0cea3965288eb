"""Checkpoints: one file, written whole or not at all, read without executing anything in it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppo_fast import __version__
from ppo_fast.checkpointing.contents import check_contents
from ppo_fast.checkpointing.identity import (
    check_frozen,
    check_identity,
    fingerprint,
    frozen_fingerprint,
    identity,
    load_trained_state,
    trained_state,
)
from ppo_fast.checkpointing.manifest import MANIFEST, find_damage, make_manifest
from ppo_fast.checkpointing.optimizer_state import (
    check_optimizer,
    optimizer_state,
    restore_optimizer,
)
from ppo_fast.checkpointing.random_states import random_states, restore_random_states
from ppo_fast.checks import is_whole, plain_numbers
from ppo_fast.disk.files import written

FORMAT, VERSION = "ppo_fast checkpoint", 3
CONTENTS = {
    "version",
    "step",
    "identity",
    "reference",
    "frozen",
    "models",
    "optimizers",
    "stats",
    "seed",
    "prompts_drawn",
    "sequences_sampled",
    "random_states",
}


def checkpoint_path(folder: str | Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return Path(folder) / f"ppo_checkpoint_step_{step}.pt"


def write_checkpoint(
    path: Path,
    step: int,
    *,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    reference: nn.Module,
    progress: dict[str, Any],
    config: dict[str, Any],
) -> None:
    """Write all that a run needs to go on, whole or not at all.

    Args:
        path: path of the file.
        step: number of the step.
        modules: the trained modules, by name; of frozen weights the file holds a fingerprint.
        optimizers: by name.
        reference: the model that the KL is measured to; its fingerprint is written.
        progress: counters and the seed.
        config: the settings.

    Raises:
        OSError: it cannot be written.
    """
    save(
        {
            "step": step,
            "identity": {name: identity(module) for name, module in modules.items()},
            "reference": fingerprint(reference),
            "frozen": {name: frozen_fingerprint(module) for name, module in modules.items()},
            "models": {name: trained_state(module) for name, module in modules.items()},
            "optimizers": {n: optimizer_state(o, modules[n]) for n, o in optimizers.items()},
            **progress,
            "random_states": random_states(),
            "config": config,
            "versions": {"ppo_fast": __version__, "torch": str(torch.__version__)},
        },
        path,
    )


def read_checkpoint(
    path: Path,
    *,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    reference: nn.Module,
    seed: int,
) -> dict[str, Any]:
    """Restore modules, optimizers and random states from a checkpoint, and return its contents.

    Nothing in the file is executed. If the file does not fit, nothing is changed. Warns if the
    reference or the seed is another.

    Raises:
        FileNotFoundError, ValueError: no file; truncated, not ours, or of another model.
    """
    payload = load(path)
    if payload["models"].keys() != modules.keys():
        raise ValueError(
            f"checkpoint: {path} holds {sorted(payload['models'])}, the trainer has "
            f"{sorted(modules)}; construct the trainer with the same critic"
        )
    try:
        _check_fit(payload, path, modules, optimizers)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"checkpoint: {path} is damaged ({type(error).__name__}: {error})"
        ) from error
    if payload["reference"] != fingerprint(reference):
        warnings.warn(
            f"{path} was trained against another reference model; construct the trainer with the "
            "policy that training started from, or the KL is measured to the wrong model",
            stacklevel=3,
        )
    if payload["seed"] != seed:
        warnings.warn(
            f"{path} was trained with seed {payload['seed']}, the trainer's is {seed}: prompts and "
            "sampled tokens will differ from those of an uninterrupted run",
            stacklevel=3,
        )
    for name, module in modules.items():
        load_trained_state(module, payload["models"][name])
    for name, optimizer in optimizers.items():
        restore_optimizer(optimizer, payload["optimizers"][name], modules[name])
    restore_random_states(payload["random_states"])
    return payload


def _check_fit(
    payload: dict[str, Any],
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
) -> None:
    """Raise ValueError where a checkpoint's models or optimizers are not the trainer's."""
    for name, module in modules.items():
        check_identity(name, payload["identity"][name], module, path)
    for name, optimizer in optimizers.items():
        check_optimizer(name, payload["optimizers"][name], optimizer, modules[name], path)
    for name, module in modules.items():
        check_frozen(name, payload["frozen"][name], module, path)
    states = {name: trained_state(module) for name, module in modules.items()}
    check_contents(payload, path, states=states, optimizers=optimizers)


def save(payload: dict[str, Any], path: Path) -> None:
    """Write ``payload`` (tensors, numbers, texts, lists, dicts) and its manifest to ``path``.

    If writing fails, a file that had the name before is unchanged.
    """
    contents = {"format": FORMAT, "version": VERSION, **plain_numbers(payload)}
    contents[MANIFEST] = make_manifest(contents)
    try:
        with written(path) as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:  # torch's, of its zip writer, hide what is behind them
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(
            f"checkpoint: {path} cannot be written ({cause}); those before it stay whole"
        ) from error


def folder_path(folder: str | Path) -> Path:
    """Return the path of a folder for checkpoints.

    Raises:
        ValueError: it is no path.
    """
    if isinstance(folder, Path) or (isinstance(folder, str) and folder and "\0" not in folder):
        return Path(folder)
    raise ValueError(f"checkpoint_dir: {folder!r} cannot be made a folder (it is no path)")


def make_folder(folder: Path) -> None:
    """Make the folder of the checkpoints, before any training.

    Raises:
        ValueError: it cannot be made (chained).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"checkpoint_dir: {str(folder)!r} cannot be made a folder ({error})"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a file that ``save`` wrote. Nothing in it is executed (``weights_only``).

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the disk does not give it.
        ValueError: it is truncated, not a ppo_fast checkpoint, or of a newer version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:  # of the disk: the file itself may be whole
        raise OSError(f"checkpoint: {path} cannot be read ({error})") from error
    except Exception as error:  # torch raises half a dozen types for files it cannot read
        # not torch's message: it advises to let the file execute code
        raise ValueError(
            f"checkpoint: {path} cannot be read ({type(error).__name__}); it is truncated, damaged "
            "or not a checkpoint"
        ) from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise ValueError(f"checkpoint: {path} was not written by ppo_fast")
    if missing := CONTENTS - payload.keys():
        raise ValueError(f"checkpoint: {path} is damaged: it lacks {sorted(missing)}")
    if not is_whole(payload["version"]) or payload["version"] > VERSION:
        raise ValueError(
            f"checkpoint: {path} has format version {payload['version']}, this ppo_fast reads up "
            f"to {VERSION}; update it"
        )
    # version 2 had no manifest
    if payload["version"] > 2 and (damage := find_damage(payload)) is not None:
        raise ValueError(f"checkpoint: {path} is damaged: {damage}")
    return payload
