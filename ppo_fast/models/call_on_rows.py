"""Call reward and value modules on rows of tokens.

Our modules and transformers' classifiers get padded batches. Modules of other classes get rows of
equal length without padding, so that code which reads position -1 or counts absolute positions is
right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_fast.data.batches import batches_by_tokens
from ppo_fast.models.heads import RewardModel, ValueModel


def takes_padding(module: nn.Module) -> bool:
    """Return whether ``module`` is known to be right on right-padded batches with a mask.

    Our models and those that transformers ships are; classes that users derive from them are not.
    """
    if isinstance(module, PreTrainedModel):
        return type(module).__module__.startswith("transformers.")
    return type(module) in (RewardModel, ValueModel)


def output_tensor(output: Any, what: str) -> Tensor:
    """Return the tensor in a module's output: itself, ``.logits``, or the first of a tuple.

    Raises:
        TypeError: there is none.
    """
    if hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and len(output) > 0:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{what} returned {type(output).__name__}, expected a tensor, a tuple that starts with "
            "one, or an object with .logits"
        )
    return output


def call_on_rows(
    module: nn.Module, rows: Sequence[Tensor], *, max_tokens: int, what: str
) -> list[Tensor]:
    """Return the output of ``module(input_ids, attention_mask)`` for each row of ids [length].

    Args:
        max_tokens: max tokens in one call.
        what: the module's name in errors.

    Returns:
        One tensor per row: [] for a module that gives one number per sequence ([n] or [n, 1]),
            [length] for one that gives one per token ([n, L] or [n, L, 1]).

    Raises:
        ValueError: another shape.
        RuntimeError: the module raised (chained).
    """
    lengths = torch.tensor([len(row) for row in rows], device="cpu")
    outputs: list[Tensor] = [torch.empty(0, dtype=torch.float32, device="cpu")] * len(rows)
    for batch in _batches(lengths, max_tokens, equal_lengths=not takes_padding(module)):
        members = [rows[i] for i in batch.tolist()]
        try:
            result = _call(module, members)
        except Exception as error:
            raise RuntimeError(f"{what} raised {type(error).__name__}: {error}") from error
        values = _as_numbers(output_tensor(result, what), members, what)
        for i, row, value in zip(batch.tolist(), members, values, strict=True):
            outputs[i] = value[: len(row)] if value.dim() == 1 else value
    return outputs


def _batches(lengths: Tensor, max_tokens: int, *, equal_lengths: bool) -> list[Tensor]:
    if not equal_lengths:
        return batches_by_tokens(lengths, max_tokens)
    groups = [torch.nonzero(lengths == n).flatten() for n in lengths.unique()]
    return [g[part] for g in groups for part in batches_by_tokens(lengths[g], max_tokens)]


def _call(module: nn.Module, rows: list[Tensor]) -> Any:
    if not takes_padding(module):
        ids = torch.stack(rows)
        return module(ids, torch.ones_like(ids))
    config = getattr(module, "config", None)
    # transformers' classifiers find the last token by their pad id; the others by the mask alone
    pad_id = getattr(config, "pad_token_id", None) or 0
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows], device="cpu")
    # In a causal body, real tokens never attend to padding on the right; without a mask, attention
    # takes its fastest form.
    if isinstance(module, ValueModel):
        return module(input_ids=ids)
    if isinstance(module, RewardModel):
        return module(input_ids=ids, last=(lengths - 1).to(ids.device))
    mask = torch.arange(ids.shape[1], device="cpu") < lengths[:, None]
    return module(input_ids=ids, attention_mask=mask.long().to(ids.device))


def _as_numbers(output: Tensor, rows: list[Tensor], what: str) -> Tensor:
    """Return the output as [n], one number per sequence, or [n, L], one per token."""
    n, width = len(rows), max(len(row) for row in rows)
    if n == 1 and (output.dim() == 0 or (output.shape == (width,) and width > 1)):
        output = output[None]  # a module that ends in .squeeze(), called on one row
    if output.dim() == 3 and output.shape[-1] == 1:
        output = output.squeeze(-1)
    if output.shape == (n, 1) and width > 1:
        output = output.squeeze(-1)
    if output.shape not in ((n,), (n, width)):
        raise ValueError(
            f"{what} returned shape {list(output.shape)} for input_ids {[n, width]}; expected "
            f"[{n}] or [{n}, 1] (one number per sequence) or [{n}, {width}] (one per token)"
        )
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
