"""Check that decoding by slots computes what the model does, once per model, before it decodes."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ppo_fast.models.checks import dtype_name
from ppo_fast.models.language_model import LanguageModel, nan_error
from ppo_fast.models.patching import uncompiled
from ppo_fast.models.precision import HALF, computing_in_float32
from ppo_fast.models.probe import relative_difference
from ppo_fast.models.transformers_internals import output_of
from ppo_fast.rollout.prompts import Prompts
from ppo_fast.rollout.slots import SlotCache, step_arguments
from ppo_fast.rollout.speedups.fused_layers import fused_layers, why_not_all_are_fused
from ppo_fast.rollout.speedups.step_attention import step_attention

# Lengths differ, so that every row is at a different position. Ids are those of no special tokens:
# some models count positions without padding.
PROBE = ((11, 15, 12, 17, 13), (14, 11, 16), (12, 18, 15, 11))

# Devices on which steps attend by ``decode_attention``; the CPU has whole layers in C++ instead.
ATTENDING_DEVICES = {"cuda"}


class FusedLayers(NamedTuple):
    """Which layers are fused in decoding.

    number: how many layers are fused.
    why_not: reason why the others are not; None: all are.
    failed: whether layers were tried and failed the comparison with their own forward.
    """

    number: int
    why_not: str | None
    failed: bool = False


_fusable: WeakKeyDictionary[LanguageModel, FusedLayers] = WeakKeyDictionary()
_attending: WeakKeyDictionary[LanguageModel, str | None] = WeakKeyDictionary()


def layers_can_be_fused(model: LanguageModel) -> bool:
    """Return whether the model's steps may run on ``fused_layers``; see ``check_layers``."""
    return check_layers(model).number > 0


@torch.no_grad()
def check_layers(model: LanguageModel) -> FusedLayers:
    """Return which of the model's layers may be fused. Remembered per model.

    Raises:
        ValueError: with its own layers, a prompt and a step by slots give other logits than one
            pass over all tokens, or either gives NaN.
    """
    if model not in _fusable:
        with uncompiled(model.model):
            _fusable[model] = _check(model)
    return _fusable[model]


def steps_can_attend(model: LanguageModel) -> bool:
    """Return whether the model's steps may run within ``step_attention``."""
    return model.device.type in ATTENDING_DEVICES and check_attention(model) is None


@torch.no_grad()
def check_attention(model: LanguageModel) -> str | None:
    """Return the reason why steps may not run within ``step_attention``, or None. Remembered."""
    if model not in _attending:
        with uncompiled(model.model):
            _attending[model] = _cannot_attend(model)
    return _attending[model]


def _cannot_attend(model: LanguageModel) -> str | None:
    rows, expected = rows_and_logits(model)
    with step_attention(model) as used:
        try:
            found = logits_by_slots(model, rows, fused=False, attends=True)
        except NotImplementedError as error:
            return str(error)
    layers = model.text_config.num_hidden_layers
    if len(used) != layers:
        return f"{len(used)} of {layers} layers call attention through AttentionInterface"
    difference = relative_difference(found, expected)
    fits = difference <= model.tolerance
    return None if fits else f"logits differ by {difference:.1e}"


def rows_and_logits(model: LanguageModel) -> tuple[list[tuple[int, ...]], Tensor]:
    """Return rows of tokens and the logits [n, V] after each, by a pass per row of the plain
    model."""
    rows = [tuple(token % model.vocab_size for token in row) for row in PROBE]
    return rows, torch.cat([whole_pass(model, row) for row in rows])


def _check(model: LanguageModel) -> FusedLayers:
    rows, expected = rows_and_logits(model)
    if expected.isnan().any():
        raise nan_error(model)
    if not torch.isfinite(expected).all():
        return FusedLayers(0, "some logits are infinite, so that they cannot be compared")
    found = logits_by_slots(model, rows, fused=False)
    if found.isnan().any():
        raise nan_error(model)
    if not (difference := relative_difference(found, expected)) <= model.decoding_tolerance:
        raise ValueError(
            f"policy_model: the logits of {type(model.model).__name__} differ by {difference:.1e} "
            "between decoding with a cache and one pass over all tokens, so its responses would "
            "not be samples from the distribution that is trained"
        )
    stored = model.kv_cache_dtype
    rounded = None if stored is None else logits_by_slots(model, rows, fused=False, dtype=stored)
    if rounded is not None and (why := _rounding_fails(model, rounded, found)) is not None:
        raise ValueError(f"policy_model: {why}")
    why_not = why_not_all_are_fused(model)
    with fused_layers(model) as layers:
        if not layers:
            return FusedLayers(0, why_not)
        fused = len(layers) == model.text_config.num_hidden_layers
        try:
            found = logits_by_slots(model, rows, fused=fused)
            rounded = (
                None if stored is None else logits_by_slots(model, rows, fused=fused, dtype=stored)
            )
        except RuntimeError as error:  # a part in bfloat16 that cannot compute with float32
            if model.dtype not in HALF:
                raise
            return FusedLayers(0, f"with them, the model fails: {error}")
    if unused := [layer for layer in layers if layer.calls == 0]:
        known = unused[0].why_not
        why = known or "transformers calls them in a way that is new"
        reason = f"a step does not reach the kernels of {len(unused)} layers: {why}"
        return FusedLayers(0, reason, failed=known is None)
    # In half precision either side is off by as much as the tolerance: the model's own layers round
    # what passes from layer to layer, and fused ones do not. Of many layers, that adds up.
    limit = (2 if model.dtype in HALF else 1) * model.tolerance
    difference = relative_difference(found, expected)
    if not (difference <= limit or _no_further_from_float32(model, rows, found, expected)):
        return FusedLayers(0, f"with them, logits differ by {difference:.1e}", True)
    if (
        rounded is not None
        and (why := _rounding_fails(model, rounded, found)) is not None
        and not _no_further_from_float32(model, rows, rounded, expected)
    ):
        return FusedLayers(0, why, True)
    return FusedLayers(len(layers), why_not)


def _no_further_from_float32(
    model: LanguageModel, rows: list[tuple[int, ...]], found: Tensor, expected: Tensor
) -> bool:
    """Return whether ``found`` is as near as ``expected`` to the logits of weights in float32.

    It is not if the model is not in half precision, too large for a copy in float32, or fails with
    one.
    """
    if model.dtype not in HALF:
        return False
    try:
        with computing_in_float32(model.model):
            exact = torch.cat([whole_pass(model, row) for row in rows])
    except RuntimeError:  # as of a buffer in half precision that cannot compute with float32
        return False
    return relative_difference(found, exact) <= relative_difference(expected, exact)


def _rounding_fails(model: LanguageModel, rounded: Tensor, found: Tensor) -> str | None:
    """Return the reason why keys and values may not be rounded to ``kv_cache_dtype``, or None.

    ``rounded`` and ``found`` are the logits with such a cache, and with one as steps compute it.
    """
    limit = (2 if model.dtype in HALF else 1) * model.cache_tolerance
    if (difference := relative_difference(rounded, found)) <= limit:
        return None
    assert model.kv_cache_dtype is not None
    name = dtype_name(model.kv_cache_dtype)
    return f"with keys and values in {name}, logits differ by {difference:.1e}"


def whole_pass(model: LanguageModel, row: tuple[int, ...]) -> Tensor:
    ids = torch.tensor([row], device=model.device)
    return output_of(model.model, input_ids=ids, use_cache=False).logits[:, -1]


def logits_by_slots(
    model: LanguageModel,
    rows: list[tuple[int, ...]],
    *,
    fused: bool,
    attends: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the logits [n, V] after each row, computed as a prompt and a last token in a step.

    ``dtype`` is SlotCache's.
    """
    heads = [row[:-1] for row in rows]
    longest = max(map(len, rows))
    cache = SlotCache(model.text_config, len(rows), longest, attends=attends, dtype=dtype)
    prompts = Prompts(model, heads, 1 << 20, 0, [], fused=fused)
    prompts.read(heads, cache)
    for batch, sources, slots in prompts.take(heads):
        index = torch.tensor(sources, device=model.device)
        cache.fill(batch.keys_values, index, torch.tensor(slots, device=model.device))
    lengths = torch.tensor([len(head) for head in heads], device=model.device)
    last = torch.tensor([row[-1] for row in rows], device=model.device)
    return model.next(**step_arguments(model, cache, last, lengths, int(lengths.max()) + 1)).logits
