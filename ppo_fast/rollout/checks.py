"""Whether decoding by slots computes what the model does: asked once, before it decodes."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ppo_fast.language_model import LanguageModel, tolerance
from ppo_fast.rollout.layers import fused_layers
from ppo_fast.rollout.prompts import Prompts
from ppo_fast.rollout.slots import SlotCache, step_arguments
from ppo_fast.rollout.step_attention import step_attention

logger = logging.getLogger(__name__)

# Lengths differ, so that every row stands at a place of its own.
PROBE = ((1, 5, 2, 7, 3), (4, 1, 6), (2, 8, 5, 1))

# Where steps attend by ``decode_attention``: the CPU has whole layers in C++.
ATTENDING_DEVICES = {"cuda"}

_fusable: WeakKeyDictionary[LanguageModel, bool] = WeakKeyDictionary()
_attending: WeakKeyDictionary[LanguageModel, bool] = WeakKeyDictionary()


@torch.no_grad()
def layers_can_be_fused(model: LanguageModel) -> bool:
    """Whether the model's steps may run on ``fused_layers``. Remembered.

    Raises:
        ValueError: with its own layers, a prompt and a step by slots give other logits than one
            pass over all tokens.
    """
    if model not in _fusable:
        _fusable[model] = _check(model)
    return _fusable[model]


@torch.no_grad()
def steps_can_attend(model: LanguageModel) -> bool:
    """Whether the model's steps may run within ``step_attention``. Remembered."""
    if model.device.type not in ATTENDING_DEVICES:
        return False
    if model not in _attending:
        reason = _cannot_attend(model)
        _attending[model] = reason is None
        logger.info("decoding attends by %s", reason or "decode_attention")
    return _attending[model]


def _cannot_attend(model: LanguageModel) -> str | None:
    rows, expected = _rows_and_logits(model)
    own = "the model's own attention, with copies of keys and values for every head: "
    with step_attention(model) as used:
        try:
            found = _by_slots(model, rows, fused=False, attends=True)
        except NotImplementedError as error:
            return own + str(error)
    layers = model.text_config.num_hidden_layers
    if len(used) != layers:
        return own + f"{len(used)} of {layers} layers take theirs from AttentionInterface"
    difference = _difference(found, expected)
    fits = difference <= tolerance(model.dtype, model.device)
    return None if fits else own + f"logits differ by {difference:.1e}"


def _rows_and_logits(model: LanguageModel) -> tuple[list[tuple[int, ...]], Tensor]:
    """Rows of tokens, and the logits [n, V] after each by one pass of the plain model."""
    vocab_size = model.text_config.vocab_size
    rows = [tuple(token % vocab_size for token in row) for row in PROBE]
    return rows, torch.cat([_whole_pass(model, row) for row in rows])


def _check(model: LanguageModel) -> bool:
    rows, expected = _rows_and_logits(model)
    if not torch.isfinite(expected).all():
        return False  # nothing can be compared; decoding says so
    difference = _difference(_by_slots(model, rows, fused=False), expected)
    if not difference <= tolerance(model.dtype, model.device):
        raise ValueError(
            f"policy_model: {type(model.model).__name__} gives other logits token by token with a "
            f"cache than in one pass (they differ by {difference:.1e}), so that its responses "
            "would not be samples of what is trained"
        )
    with fused_layers(model) as count:
        fused = count == model.text_config.num_hidden_layers
        difference = _difference(_by_slots(model, rows, fused=fused), expected)
    fits = count > 0 and difference <= tolerance(model.dtype, model.device)
    if count:
        reason = "" if fits else f": their logits differ by {difference:.1e}"
        logger.info("decoding runs %d layers %s%s", count, "fused" if fits else "unfused", reason)
    return fits


def _whole_pass(model: LanguageModel, row: tuple[int, ...]) -> Tensor:
    ids = torch.tensor([row], device=model.device)
    return model.model(input_ids=ids, use_cache=False).logits[:, -1]


def _by_slots(
    model: LanguageModel, rows: list[tuple[int, ...]], *, fused: bool, attends: bool = False
) -> Tensor:
    """Logits [n, V] of the last token: all before it as prompts, itself in a step."""
    heads = [row[:-1] for row in rows]
    cache = SlotCache(model.text_config, len(rows), max(map(len, rows)), attends=attends)
    prompts = Prompts(model, heads, 1 << 20, 0, [], fused=fused)
    prompts.read(heads, cache)
    for batch, sources, slots in prompts.take(heads):
        index = torch.tensor(sources, device=model.device)
        cache.place(batch.keys_values, index, torch.tensor(slots, device=model.device))
    lengths = torch.tensor([len(head) for head in heads], device=model.device)
    last = torch.tensor([row[-1] for row in rows], device=model.device)
    return model.next(**step_arguments(model, cache, last, lengths, int(lengths.max()) + 1)).logits


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
