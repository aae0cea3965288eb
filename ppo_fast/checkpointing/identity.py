"""Whether a checkpoint is of the trainer's models: their shapes, and hashes of frozen weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppo_fast.models.quantized import constant_names


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
