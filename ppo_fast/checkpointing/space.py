"""Space on the disk that a run will take, compared with what is free before it starts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ppo_fast.checkpointing.identity import trained_state
from ppo_fast.learning.half_adamw import HalfAdamW

logger = logging.getLogger(__name__)

# Bytes of a checkpoint's file for each tensor (its entry in the archive, its digest) and for all
# else (the states of random generators, settings), as measured.
PER_TENSOR, REST = 460, 20_000
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1}


def checkpoint_bytes(modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> int:
    """Return the size of a checkpoint's file once every trained weight has its moments.

    It is a little larger than the file where some of them never get a gradient.

    Args:
        modules: the trained modules, by name.
        optimizers: by name; AdamW or HalfAdamW, which need not have taken a step.
    """
    tensors = [t for module in modules.values() for t in trained_state(module).values()]
    size, count = _bytes_of(tensors), len(tensors)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            for weight in group["params"]:
                size += weight.numel() * _moment_bytes(optimizer, weight)
                count += 3  # two moments and the number of steps
    return size + PER_TENSOR * count + REST


def weights_bytes(module: nn.Module, *, trained_only: bool = False) -> int:
    """Return the bytes of a module's weights as they are stored, such as an export writes.

    Args:
        module: the module; a tensor under several names counts once.
        trained_only: whether frozen weights are left out.
    """
    state = trained_state(module) if trained_only else module.state_dict()
    return _bytes_of(state.values())


def check_space(
    folder: Path,
    checkpoint: int,
    exports: Mapping[str, int],
    *,
    num_steps: int,
    checkpoint_freq: int,
    keep_last: int | None,
    keep_best: int = 0,
    done: int = 0,
    existing: int = 0,
    name: str = "output_dir",
) -> None:
    """Check that what a run will write fits on the disk, and warn where not all will.

    Args:
        folder: of the run; it need not exist.
        checkpoint: bytes of one.
        exports: bytes of what is written after the last step, by name.
        num_steps: steps of the whole run; after the last one there is a checkpoint.
        checkpoint_freq: steps between checkpoints.
        keep_last: number of checkpoints that are kept; None: all.
        keep_best: number that are kept besides.
        done: steps that are done already.
        existing: checkpoints that are in the folder already.
        name: the argument that named the folder, for messages.

    Raises:
        ValueError: it does not fit, not even with keep_last=1.
    """
    free = shutil.disk_usage(_nearest(folder)).free
    steps = range(done - done % checkpoint_freq + checkpoint_freq, num_steps, checkpoint_freq)
    writes = [*steps, num_steps] if num_steps > done else []
    both = sum(exports.values())

    def full_at(keep: int | None) -> str | None:
        """Return when the disk will be full; None: everything fits."""
        there = existing
        for step in writes:
            if (there + 1 - existing) * checkpoint > free:
                return f"at step {step}"
            there = there + 1 if keep is None else min(there + 1, keep + keep_best)
        over = (there - existing) * checkpoint + both > free
        return f"after the last step, when {' and '.join(exports)} are written" if over else None

    if full_at(1) is not None:
        count = min(len(writes), 2 + keep_best)
        parts = {f"{count} checkpoint{'s' * (count > 1)}": count * checkpoint} if count else {}
        parts |= exports
        listed = ", ".join(f"{part} {shown_bytes(size)}" for part, size in parts.items())
        use = "" if keep_last == 1 else ", use keep_last=1"
        raise ValueError(
            f"{name}: {folder} has {shown_bytes(free)} free; a run writes {listed}; free some "
            f"space{use}, or name a folder on another disk"
        )
    if (when := full_at(keep_last)) is not None:
        fits = max(n for n in range(1, len(writes) + existing + 1) if full_at(n) is None)
        logger.warning(
            "%s: %s has %s free, and each checkpoint takes %s: it will be full %s; "
            "keep_last=%d fits",
            name,
            folder,
            shown_bytes(free),
            shown_bytes(checkpoint),
            when,
            fits,
        )


def shown_bytes(size: float) -> str:
    """Return a number of bytes as a short text: 1.5 GB."""
    unit = next(u for u in ("GB", "MB", "kB", "B") if size >= UNITS[u] or u == "B")
    return f"{size / UNITS[unit]:.3g} {unit}"


def _moment_bytes(optimizer: Optimizer, weight: Tensor) -> int:
    """Return the bytes of an optimizer's state for each element of a weight."""
    if not isinstance(optimizer, HalfAdamW):
        return 2 * weight.element_size()
    lost = optimizer.rounding == "kahan" and weight.dtype == torch.bfloat16
    return 2 * 4 + (weight.element_size() if lost else 0)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors; those that share their storage count once, as a file has it."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({(s.device, s.data_ptr()): s.nbytes() for s in storages}.values())


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest above it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
