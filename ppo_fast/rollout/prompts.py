"""Prompts, each computed once, however many responses it gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.data.batches import batches_by_tokens
from ppo_fast.data.tokens import pad_right
from ppo_fast.models.language_model import LanguageModel, Next
from ppo_fast.rollout.request import PromptIds
from ppo_fast.rollout.slots import SlotCache


class PromptBatch(NamedTuple):
    """Output of one pass over k prompts, padded on the right.

    keys_values: by layer, keys and values [k, heads, P, size].
    next: logits and states that the first response tokens are drawn from.
    trunk_states: trunk states [k, P, D]; None without a trunk.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    next: Next
    trunk_states: Tensor | None


class Prompts:
    """Computes prompts when they are needed, and keeps each until its last response begins.

    Args:
        model: the policy.
        prompts: prompts of all sequences; equal ones are computed once.
        max_tokens: max tokens, with padding, of a pass.
        pad_id: id at padded positions.
        trunk_states: list that ``LanguageModel.recording_trunk`` appends to.
        fused: whether all layers are fused (fused_layers.py), so that prompts need no padding.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[PromptIds],
        max_tokens: int,
        pad_id: int,
        trunk_states: list[Tensor],
        *,
        fused: bool,
    ) -> None:
        self._model, self._pad_id, self._trunk = model, pad_id, trunk_states
        self._max_tokens = max_tokens
        # without the fused LM head, a pass gives logits of each row's last column alone
        self._fused, self._wanted = fused and model.fused, Counter(prompts)
        self._computed: dict[PromptIds, tuple[PromptBatch, int]] = {}

    def read(self, prompts: Sequence[PromptIds], cache: SlotCache) -> None:
        """Compute those of ``prompts`` that are not computed yet."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._computed]
        for together in self._batches(missing):
            batch = self._compute(together, cache)
            self._computed |= {prompt: (batch, row) for row, prompt in enumerate(together)}

    def take(self, prompts: Sequence[PromptIds]) -> list[tuple[PromptBatch, list[int], list[int]]]:
        """Return each pass that computed some of ``prompts``, its rows and their prompts' indices.

        A prompt is forgotten when its last response has taken it.
        """
        taken: dict[int, tuple[PromptBatch, list[int], list[int]]] = {}
        for i, prompt in enumerate(prompts):
            batch, row = self._computed[prompt]
            _, rows, chosen = taken.setdefault(id(batch), (batch, [], []))
            rows.append(row)
            chosen.append(i)
            self._wanted[prompt] -= 1
            if not self._wanted[prompt]:
                del self._computed[prompt]
        return list(taken.values())

    def _batches(self, prompts: list[PromptIds]) -> Iterator[list[PromptIds]]:
        lengths = {len(prompt) for prompt in prompts}
        # Without the fused LM head, prompts of a pass must have equal lengths (see __init__).
        for together in [lengths] if self._model.fused else [{n} for n in sorted(lengths)]:
            group = [prompt for prompt in prompts if len(prompt) in together]
            batches = batches_by_tokens(
                torch.tensor([len(p) for p in group], device="cpu"), self._max_tokens
            )
            yield from ([group[row] for row in batch.tolist()] for batch in batches)

    def _compute(self, prompts: list[PromptIds], cache: SlotCache) -> PromptBatch:
        device = self._model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        return (
            self._flat(prompts, lengths, cache.dtype)
            if self._fused
            else self._padded(prompts, lengths, cache)
        )

    def _padded(self, prompts: list[PromptIds], lengths: Tensor, cache: SlotCache) -> PromptBatch:
        """Compute prompts in one padded pass, one row per prompt."""
        input_ids = pad_right(prompts, self._pad_id, lengths.device)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        cache.begin_prompts()
        next_ = self._model.next(
            (torch.arange(len(prompts), device=lengths.device), lengths - 1),
            input_ids=input_ids,
            position_ids=positions.expand_as(input_ids),
            attention_mask=torch.ones_like(input_ids),  # no token looks at padding after it
            cache=cache,
        )
        return PromptBatch(cache.prompts(), next_, self._trunk.pop() if self._trunk else None)

    def _flat(
        self, prompts: list[PromptIds], lengths: Tensor, dtype: torch.dtype | None
    ) -> PromptBatch:
        """Compute prompts in one pass without padding, one row per token.

        ``dtype`` is SlotCache's.
        """
        rows = torch.repeat_interleave(torch.arange(len(prompts), device="cpu"), lengths)
        positions = torch.cat([torch.arange(len(prompt), device="cpu") for prompt in prompts])
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device="cpu")
        ends = lengths.cumsum(0) - 1
        cache = SlotCache(self._model.text_config, len(prompts), int(lengths.max()), dtype=dtype)
        cache.begin_rows(rows, positions)
        next_ = self._model.next(
            (ends, torch.zeros_like(ends)),
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            # fused layers read no mask; given one of four dimensions, the model makes no other
            attention_mask=torch.zeros(1, 1, 1, 1, dtype=self._model.dtype, device="cpu"),
            cache=cache,
        )
        trunk_states = None
        if self._trunk:
            piece = self._trunk.pop()[:, 0]
            trunk_states = piece.new_zeros(len(prompts), cache.capacity, piece.shape[1])
            trunk_states[rows, positions] = piece
        return PromptBatch(cache.contents(), next_, trunk_states)
