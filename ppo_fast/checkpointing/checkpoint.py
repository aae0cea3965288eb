"""Checkpoints: one file, written whole or not at all, read without executing anything in it."""

from __future__ import annotations

import hashlib
import logging
import random
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ppo_fast import __version__
from ppo_fast.checkpointing.contents import check_contents
from ppo_fast.checkpointing.manifest import MANIFEST, find_damage, make_manifest
from ppo_fast.checkpointing.optimizer_state import (
    check_optimizer,
    optimizer_state,
    restore_optimizer,
)
from ppo_fast.checks import is_whole, plain_numbers
from ppo_fast.disk.files import written
from ppo_fast.models.quantized import constant_names

logger = logging.getLogger(__name__)

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


# Settings of which a number set by hand in the run is another form.
BY_HAND = {"learning_rate": "policy", "value_learning_rate": "value", "kl_penalty": "kl"}


def settle_settings(contents: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return the learner's state of a checkpoint, for a trainer with these settings.

    Where a setting was changed since the checkpoint, it counts, and not the number that was set by
    hand in the run. Both are logged.

    Args:
        contents: of the checkpoint that was loaded.
        config: the trainer's settings.
    """
    before, learner = contents.get("config", {}), dict(contents.get("learner", {}))
    changed = {name for name, value in config.items() if before.get(name, value) != value}
    if changed:
        listed = ", ".join(f"{n} {before[n]!r} -> {config[n]!r}" for n in sorted(changed))
        logger.warning("settings changed since the checkpoint: %s", listed)
    given = {BY_HAND[name] for name in changed if name in BY_HAND}
    if config["value_learning_rate"] is None and "policy" in given:
        given.add("value")
    if not learner:
        return learner
    learner["rates"] = {k: v for k, v in learner.get("rates", {}).items() if k not in given}
    if "kl" in given:
        learner["coefficients"] = learner["coefficients"] | {"by_hand": 0.0, "factor": 1.0}
    by_hand = [f"the rate of the {name} is {rate:g}" for name, rate in learner["rates"].items()]
    if learner["coefficients"].get("by_hand"):
        by_hand.append("the KL's coefficient")
    if by_hand:
        logger.warning("as changed in the run before: %s", ", ".join(by_hand))
    return learner


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


def identity(model: nn.Module) -> dict[str, Any]:
    """Return a model's class and the shape of each of its weights."""
    constants = constant_names(model)  # one of them is a text, of any length
    state = model.state_dict().items()
    shapes = {name: list(tensor.shape) for name, tensor in state if name not in constants}
    return {"class": type(model).__name__, "shapes": shapes}


def check_identity(name: str, saved: dict[str, Any], model: nn.Module, path: Path) -> None:
    """Raise ValueError where a checkpoint's model is not the trainer's."""
    own = identity(model)
    if saved["class"] != own["class"]:
        raise ValueError(
            f"checkpoint: {path} holds a {name} of class {saved['class']}, the trainer's is "
            f"{own['class']}"
        )
    for weight in sorted(saved["shapes"].keys() | own["shapes"].keys()):
        theirs, ours = saved["shapes"].get(weight), own["shapes"].get(weight)
        if theirs != ours:
            raise ValueError(
                f"checkpoint: {path} is of another {name}: {weight} has shape {theirs} in the file "
                f"and {ours} in the trainer"
            )


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict without frozen weights, which the base model has."""
    frozen = _frozen_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_trained_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load what ``trained_state`` returned, into a model with the same frozen weights."""
    names = _frozen_names(model) - constant_names(model)
    frozen = {name: model.state_dict()[name] for name in names}
    model.load_state_dict(frozen | state)


def check_frozen(name: str, saved: str, model: nn.Module, path: Path) -> None:
    """Raise ValueError where a model's frozen weights are not those of a checkpoint's model."""
    if saved != frozen_fingerprint(model):
        raise ValueError(
            f"checkpoint: {path} holds only the trained weights of the {name}, and was saved with "
            "other frozen weights than the trainer's; construct the trainer with the model that "
            "training started from, and the same num_layers_unfrozen"
        )


def frozen_fingerprint(model: nn.Module) -> str:
    frozen = _frozen_names(model)
    return _fingerprint(t for name, t in model.state_dict().items() if name in frozen)


def _frozen_names(model: nn.Module) -> set[str]:
    """Return the names of frozen weights in the state of ``model``; a tied weight has several.

    The constants of quantised weights are frozen too.
    """
    named = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, p in named if not p.requires_grad} & model.state_dict().keys()
    return frozen | constant_names(model)


def fingerprint(model: nn.Module) -> str:
    """Return a short hash of a sample of every weight, to tell whether two models are the same."""
    return _fingerprint(model.state_dict().values())


def _fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        sample = tensor.detach().flatten()[:: max(tensor.numel() // 64, 1)]
        digest.update(sample.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()[:16]


def random_states() -> dict[str, Any]:
    """Return the states of torch's, numpy's and Python's random generators."""
    # the legacy generator: users' reward functions may draw from it
    state: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    kind, keys, position, has_gauss, cached = state
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Restore what ``random_states`` returned; CUDA states only for the same number of devices."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, position, has_gauss, cached = states["numpy"]
    keys = keys.numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, cached))  # noqa: NPY002
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
