"""States of optimizers in checkpoints: in the order of a module's weights, not of groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer


def optimizer_state(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Return the state of an optimizer of ``module``'s trained weights, as of one group of these.

    Groups differ in their weight decay, which may be another for the rest of a run. The state of an
    optimizer of other weights is returned as it is.
    """
    state, order = optimizer.state_dict(), _order(optimizer, module)
    if order is None:
        return state
    group = state["param_groups"][0] | {"params": list(range(len(order)))}
    moved = {order[index]: found for index, found in state["state"].items()}
    return {"state": moved, "param_groups": [group]}


def check_optimizer(
    name: str, saved: dict[str, Any], optimizer: Optimizer, module: nn.Module, path: Path
) -> None:
    """Raise ValueError where a checkpoint's optimizer has another number of weights."""
    groups = (saved["param_groups"], optimizer.param_groups)
    theirs, ours = ([len(group["params"]) for group in part] for part in groups)
    if _order(optimizer, module) is not None and len(theirs) == 1:
        theirs, ours = [sum(theirs)], [sum(ours)]
    if theirs != ours:
        raise ValueError(
            f"checkpoint: {path} has {sum(theirs)} tensors in the optimizer of the {name}, the "
            f"trainer's has {sum(ours)}; construct the trainer with the same num_layers_unfrozen "
            "and frozen"
        )


def restore_optimizer(optimizer: Optimizer, saved: dict[str, Any], module: nn.Module) -> None:
    """Load an optimizer's moments.

    Learning rate and other settings stay those of the trainer's config, which may have been changed
    for the rest of the run. A rate that a scheduler had set (it adds the setting "initial_lr") is
    that of the checkpoint: the scheduler goes on from it.
    """
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    order = _order(optimizer, module)
    if order is not None and len(saved["param_groups"]) == 1:
        groups = [
            saved["param_groups"][0] | {"params": group["params"]}
            for group in optimizer.state_dict()["param_groups"]
        ]
        known = {i: saved["state"][k] for i, k in enumerate(order) if k in saved["state"]}
        saved = {"state": known, "param_groups": groups}
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        scheduled = {k: group[k] for k in ("lr", "initial_lr") if "initial_lr" in group}
        group.update(settings | scheduled)


def _order(optimizer: Optimizer, module: nn.Module) -> list[int] | None:
    """Return for each weight of the optimizer its number among the module's trained weights.

    None: the optimizer is one of other weights, or has groups with rates of their own.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    numbers = {id(p): number for number, p in enumerate(trained)}
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    rates = {group["lr"] for group in optimizer.param_groups}
    if len(rates) > 1 or {id(p) for p in weights} != numbers.keys():
        return None
    return [numbers[id(p)] for p in weights]
