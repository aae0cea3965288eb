"""Random settings of PPOConfig and arguments of train: some that fit, some that do not."""

from __future__ import annotations

import random
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

from ppo_fast import PPOConfig

NAN, INF = float("nan"), float("inf")
FITTING_FLOATS = (0, 1, 0.5, 0.1, 0.9, 1e-5, 1e-3, 2, 10.0, 1e-8, np.float32(0.3))
FLOATS = (*FITTING_FLOATS, 1e3, 1e6, 1e30, -0.1, -1, NAN, INF, -INF, 1e308, 1e-320, True, "0.5",
          None, [], Fraction(1, 3), Decimal("0.1"), 10**400, 1j, torch.tensor(0.5))  # fmt: skip
FITTING_WHOLES = (1, 2, 3, np.int64(2))
WHOLES = (*FITTING_WHOLES, 0, 5, 64, -1, 1.0, 1.5, NAN, "3", None, True, [2], torch.tensor(2))
# Where they mean no work, or are to be refused.
LARGE_WHOLES = (*WHOLES, 10_000, 2**31 - 1, 2**31, 2**62, 2**63, 10**30)
WORDS = ("", "Clip", "none", "None", 3, None, True, b"clip", ["clip"], "a" * 200, "\ud800", "\0")
TEXTS = ("*", "*.self_attn.*", "model.*", "[", "", "\n", "end", " ", "e", 3, None, b"x", "\ud800")
# Each more of these is more work, so that large ones are asked for in vain.
WORK = {"num_epochs", "value_epochs", "samples_per_prompt", "max_resampled_batches"}
HINTS = get_type_hints(PPOConfig)
NAMES = [item.name for item in fields(PPOConfig)]
# Settings that go together, for other settings to be added to.
BASES: tuple[dict[str, Any], ...] = (
    {},
    {"critic": "head"},
    {"critic": "baseline", "samples_per_prompt": 2},
    {"critic": "group_norm", "samples_per_prompt": 2, "kl_in": "loss"},
    {"critic": "batch_mean"},
    {"critic": "model"},
    {"critic": "top", "num_layers_unfrozen": 1},
    {"critic": "head", "num_layers_unfrozen": 1, "trunk_dtype": "bfloat16"},
    {"critic": "head", "compute_dtype": "bfloat16", "trained_weights": "kahan"},
    {"critic": "head", "num_layers_unfrozen": 1, "kv_cache_dtype": "bfloat16"},
    {"critic": "head", "entropy_target": 3.0, "lr_schedule": "cosine"},
    {"critic": "head", "kl_controller": "adaptive", "kl_target": 1.0},
    {"top_k": 5, "top_p": 0.9, "importance": "truncate"},
    {"samples_per_prompt": 2, "max_resampled_batches": 1, "reward_normalization": "group"},
)


def settings(draw: random.Random) -> dict[str, Any]:
    """Return a base with up to five settings changed."""
    small = {"max_length": 4, "num_epochs": 1}
    changed = draw.sample(NAMES, draw.choice((0, 1, 1, 1, 2, 2, 3, 5)))
    return small | draw.choice(BASES) | {name: value_of(draw, name) for name in changed}


ITEMS: dict[Any, Any] = {int: WHOLES, float: FLOATS, str: TEXTS}


def value_of(draw: random.Random, name: str) -> Any:
    """Return a value for a setting; two of three have its type, and are often allowed."""
    hint, strange = HINTS[name], draw.random() < 1 / 3
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if NoneType in parts and draw.random() < 0.1:
        return None
    kind = parts[0]
    if get_origin(kind) is Literal:
        return draw.choice(WORDS if strange else get_args(kind))
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        names = (*get_args(item), *WORDS)
        values = names if get_origin(item) is Literal else ITEMS[item]
        found = [draw.choice(values) for _ in range(draw.randint(0, 3))]
        return draw.choice((found, tuple(found), found[0] if found else None, {*map(str, found)}))
    if kind is bool:
        return draw.choice((True, False, 0, 1, None, "true", []) if strange else (True, False))
    if kind is int:
        large = WHOLES if name in WORK else LARGE_WHOLES
        return draw.choice(large if strange else FITTING_WHOLES)
    return draw.choice(FLOATS if strange else FITTING_FLOATS)


def arguments(draw: random.Random, folder: Path, on_step: Any) -> dict[str, Any]:
    """Return arguments of train, up to three of them strange.

    Args:
        draw: what is drawn from.
        folder: an empty folder for checkpoints.
        on_step: a function that fits.
    """
    found: dict[str, Any] = {"num_steps": draw.choice((1, 1, 2)), "batch_size": 2}
    (folder / "file").write_text("a file")
    strange: dict[str, tuple[Any, ...]] = {
        "num_steps": (0, -1, 1.5, "1", None, True, NAN, [1]),
        "batch_size": (1, 0, -1, 2.0, "2", None, 10**30, NAN, 5),
        "num_epochs": (2, 0, -1, 1.5, "1", NAN, True),
        "max_length": (1, 2, 0, -1, 1000, 2**63, 1.5, "4", NAN, True, None),
        "temperature": (0.5, 2.0, 0, -1.0, NAN, INF, 1e-30, 1e30, "hot", None, [1.0], 1e-9),
        "checkpoint_dir": (folder, str(folder), "", 3, folder / "file", "a\0b", b"x", ["x"]),
        "checkpoint_freq": (1, 0, -1, 1.5, "1", None, NAN),
        "keep_last": (1, 0, -1, 1.5, "1", NAN),
        "max_time": (60, 1e-9, 0, -1, NAN, INF, "1:00", True),
        "progress": (True, 0, None, "yes"),
        "on_step": (on_step, 3, "f", lambda: None, lambda a, b: None, type),
    }
    for name in draw.sample([*strange], draw.choice((0, 1, 1, 2, 3))):
        found[name] = draw.choice(strange[name])
    if found.get("checkpoint_dir") == "":
        found["checkpoint_dir"] = folder / "new" / "folder"
    return found
