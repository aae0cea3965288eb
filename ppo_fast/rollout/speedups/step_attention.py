"""Attention of decoding steps by ``decode_attention``, on a GPU.

transformers calls scaled_dot_product_attention with a step's queries, the cache's keys and a mask.
With grouped queries that copies keys and values for every head, in each layer and step, and reads
every column of the cache. ``decode_attention`` reads each row's own tokens, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.transformers_internals import ATTENTION_EXTRAS, attention_of, attention_set_to
from ppo_fast.ops import decode_attention
from ppo_fast.ops.gradient import as_dtype

NAME = "ppo_fast_steps"
TAKING_MASKS = ("eager", "sdpa")


@contextmanager
def masked_attention(model: LanguageModel) -> Iterator[None]:
    """Within the block, give the model an attention that takes a mask of four dimensions.

    A model that was loaded with another one, such as flash_attention_2, computes with
    scaled_dot_product_attention.
    """
    own = attention_of(model.text_config)
    with attention_set_to(own if own in TAKING_MASKS else "sdpa", model.text_config):
        yield


@contextmanager
def step_attention(model: LanguageModel) -> Iterator[set[nn.Module]]:
    """Within the block, compute attention of decoding steps by ``decode_attention``.

    This applies to models that take attention from transformers' AttentionInterface, and to steps
    of a SlotCache with ``attends``. All else is computed by scaled_dot_product_attention. Yields
    the attention modules that have computed a step by ``decode_attention``.
    """
    used: set[nn.Module] = set()
    AttentionInterface.register(NAME, partial(_attention, used))
    with attention_set_to(NAME, model.text_config):
        yield used


def _attention(
    used: set[nn.Module],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention: query [n, H, t, d], key and value [n, K, L, d] -> [n, t, H, d].

    The arguments are those of transformers' AttentionInterface.
    """
    if unknown := [name for name in ATTENTION_EXTRAS if options.get(name) is not None]:
        raise NotImplementedError(f"decode_attention has no {unknown[0]}")
    lengths = getattr(key, "lengths", None)  # slots.py sets it in steps
    if lengths is None:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **options)
    used.add(module)
    out = decode_attention(
        as_dtype(query[:, :, 0], key.dtype),  # under autocast, the cache is in its dtype
        key.transpose(1, 2),
        value.transpose(1, 2),
        lengths,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=options.get("sliding_window"),
    )
    return out[:, None], None


AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
