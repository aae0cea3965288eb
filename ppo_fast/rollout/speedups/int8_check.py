"""Check that a model's weights can be in int8 for rollouts, once per model, before it decodes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.patching import uncompiled
from ppo_fast.models.probe import relative_difference
from ppo_fast.rollout.own_cache import own_cache
from ppo_fast.rollout.speedups.fused_layers import fused_layers
from ppo_fast.rollout.speedups.int8_products import int8_products, why_no_int8
from ppo_fast.rollout.speedups.slot_check import (
    layers_can_be_fused,
    logits_by_slots,
    rows_and_logits,
    whole_pass,
)
from ppo_fast.rollout.speedups.step_forward import StepForward


class Int8Weights(NamedTuple):
    """How many weights are in int8, and how far they move the logits.

    share: share of the model's weights that are in int8.
    difference: largest difference of logits, relative to the largest logit.
    """

    share: float
    difference: float


_checked: WeakKeyDictionary[LanguageModel, Int8Weights] = WeakKeyDictionary()


@torch.no_grad()
def check_int8(model: LanguageModel) -> Int8Weights:
    """Return what weights in int8 change. Remembered per model, which is in eval mode.

    Raises:
        ValueError: no weight can be in int8, or logits are then not finite.
    """
    if model not in _checked:
        if (reason := why_no_int8(model)) is not None:
            raise _cannot(reason)
        with uncompiled(model.model):
            _checked[model] = _check(model)
    return _checked[model]


def _check(model: LanguageModel) -> Int8Weights:
    rows, expected = rows_and_logits(model)
    by_slots = own_cache(model) is None
    fuses = by_slots and layers_can_be_fused(model)
    with (
        fused_layers(model, int8=True) if fuses else nullcontext[list[StepForward]]([]) as fused,
        int8_products(model, fused) as count,
    ):
        if not count:
            raise _cannot(f"{type(model.model).__name__} has no such layers")
        if by_slots:
            all_fused = len(fused) == model.text_config.num_hidden_layers
            found = logits_by_slots(model, rows, fused=all_fused)
        else:
            found = torch.cat([whole_pass(model, row) for row in rows])
    real = expected.isfinite()
    if not found[real].isfinite().all():
        raise _cannot("with it, logits are not finite")
    weights = sum(parameter.numel() for parameter in model.model.parameters())
    return Int8Weights(count / weights, relative_difference(found[real], expected[real]))


def _cannot(reason: str) -> ValueError:
    return ValueError(
        f"rollout_weights='int8': {reason}; it needs the compiled extension and linear layers "
        "(torch.nn.Linear) in float32 or half precision on the CPU; use rollout_weights=None"
    )
