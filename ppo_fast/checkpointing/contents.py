"""Check what a checkpoint holds before anything of a trainer is changed."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ppo_fast.nonfinite import NotFiniteError, first_not_finite, weights_of


def check_contents(
    payload: Mapping[str, Any],
    path: Path,
    *,
    states: Mapping[str, Mapping[str, Tensor]],
    optimizers: Mapping[str, Optimizer],
) -> None:
    """Check a checkpoint's weights, moments, counters and random states.

    Args:
        payload: of the file.
        path: its path, for errors.
        states: the trained weights of the trainer's modules, by name.
        optimizers: by name.

    Raises:
        ValueError: something is missing, of another form, or not finite; the file is named.
    """
    try:
        damage = (
            _of_weights(payload["models"], states)
            or _of_optimizers(payload["optimizers"], optimizers)
            or _of_counters(payload)
            or _of_random_states(payload["random_states"])
        )
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        damage = f"{type(error).__name__}: {error}"
    if damage is not None:
        raise ValueError(f"checkpoint: {path} is damaged: {damage}")


def _of_weights(
    models: Mapping[str, Mapping[str, Tensor]], states: Mapping[str, Mapping[str, Tensor]]
) -> str | None:
    for name, own in states.items():
        saved = models[name]
        if different := saved.keys() ^ own.keys():
            return f"its {name} has other weights, such as {sorted(different)[0]}"
        for weight, tensor in saved.items():
            if not isinstance(tensor, Tensor) or tensor.shape != own[weight].shape:
                return f"{weight} of its {name} is no tensor of shape {list(own[weight].shape)}"
        if (infinite := first_not_finite(saved)) is not None:
            return f"{infinite} of its {name} holds NaN or infinity"
    return None


def _of_optimizers(saved: Mapping[str, Any], optimizers: Mapping[str, Optimizer]) -> str | None:
    for name in optimizers:
        groups, moments = saved[name]["param_groups"], saved[name]["state"]
        numbers = {number for group in groups for number in group["params"]}
        if not moments.keys() <= numbers:
            return f"the optimizer of its {name} has moments of weights that it has not"
        for number, entry in moments.items():
            tensors = {k: v for k, v in entry.items() if isinstance(v, Tensor)}
            if (moment := first_not_finite(tensors)) is not None:
                return f"{moment} of weight {number} in its {name}'s optimizer is not finite"
    return None


def _of_counters(payload: Mapping[str, Any]) -> str | None:
    for name in ("step", "seed", "prompts_drawn", "sequences_sampled"):
        if not isinstance(payload[name], int) or payload[name] < 0:
            return f"{name} is {payload[name]!r}"
    if not isinstance(payload["stats"]["total_steps"], (int, float)):
        return "it has no number of steps"
    for evaluation in payload.get("evaluations", []):
        numbers = [evaluation["step"], *evaluation.values()]
        if not all(isinstance(number, (int, float)) for number in numbers):
            return f"an evaluation of it holds {numbers!r}"
    if learner := payload.get("learner"):
        coefficients, moments = learner["coefficients"], learner["reward_moments"]
        rates = learner.get("rates", {})
        numbers = [*coefficients.values(), *moments, *rates.values()]
        if len(moments) != 3 or not all(map(math.isfinite, numbers)):
            return "its coefficients are not finite numbers"
    return None


def _of_random_states(states: Mapping[str, Any]) -> str | None:
    """Set the random states on new generators, which raise an error if a state does not fit."""
    torch.Generator().set_state(states["torch"])
    kind, keys, position, has_gauss, cached = states["numpy"]
    keys = keys.numpy().astype(np.uint32)
    np.random.RandomState().set_state((kind, keys, position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.Random().setstate((version, tuple(internal), gauss))
    return None if isinstance(states["cuda"], list) else "its states of CUDA are no list"


def check_finite(modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> None:
    """Check that what a checkpoint would hold is finite: a run cannot go on from NaN.

    Raises:
        NotFiniteError: a trained weight or a moment is not.
    """
    for name, module in modules.items():
        if (weight := first_not_finite(weights_of(module))) is not None:
            raise NotFiniteError(
                f"checkpoint: {weight} of the {name} holds NaN or infinity; it is not written, and "
                "the newest one before stays"
            )
    for name, optimizer in optimizers.items():
        for entry in optimizer.state.values():
            tensors = {k: v for k, v in entry.items() if isinstance(v, Tensor)}
            if (moment := first_not_finite(tensors)) is not None:
                raise NotFiniteError(
                    f"checkpoint: {moment} in the optimizer of the {name} holds NaN or infinity; "
                    "it is not written, and the newest one before stays"
                )
