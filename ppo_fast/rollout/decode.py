"""One batched, KV-cached pass that samples a response for every prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ppo_fast.language_model import LanguageModel
from ppo_fast.ops import sample_tokens
from ppo_fast.tokens import Tokens, pad_left, position_ids


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: at most ``max_length`` tokens each, from softmax(logits /
    temperature), cut to the ``top_k`` likeliest tokens (0: all) and to the likeliest that hold
    ``top_p`` of the probability (1: all)."""

    max_length: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        whole = {n: isinstance(getattr(self, n), Integral) for n in ("max_length", "top_k")}
        real = {n: isinstance(getattr(self, n), Real) for n in ("temperature", "top_p")}
        for name, ok, expected in (
            ("max_length", whole["max_length"] and self.max_length >= 1, "a whole number >= 1"),
            ("temperature", real["temperature"] and 0 < self.temperature < math.inf, "above 0"),
            ("top_k", whole["top_k"] and self.top_k >= 0, "0 (off) or more"),
            ("top_p", real["top_p"] and 0 < self.top_p <= 1, "in (0, 1]"),
        ):
            if not ok:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected {expected}")

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from another distribution than softmax(logits / t)."""
        return self.top_k > 0 or self.top_p < 1.0


class Decoded(NamedTuple):
    """Tokens with their log-probs as they were drawn, [B, T] float32, 0 beyond a response:
    ``logprobs`` under softmax(logits / t), ``sampling_logprobs`` under the truncated distribution.
    ``finished`` [B] bool on the CPU: the response ended with EOS, not at ``max_length``. ``trunk``
    [B, P + T, D]: the frozen trunk's activations, 0 for a row's last column (which no log-prob
    needs); None without a trunk."""

    tokens: Tokens
    logprobs: Tensor
    sampling_logprobs: Tensor
    finished: Tensor
    trunk: Tensor | None


@torch.no_grad()
def decode(
    model: LanguageModel,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seeds: Tensor,
    eos_ids: Sequence[int],
    pad_id: int,
) -> Decoded:
    """Sample a response for every prompt, all prompts at once.

    A response ends with the first EOS token, which belongs to it. Draws depend on a sequence's seed
    and the token's place in the response alone, not on the batch.

    Args:
        model: the policy.
        prompt_ids: B lists of ids, none empty.
        sampling: lengths and the distribution drawn from.
        seeds: [B] int64.
        eos_ids: ids that end a response; may be empty.
        pad_id: what stands at padded places; it may be an EOS id.
    """
    device = next(model.model.parameters()).device
    prompts = pad_left(prompt_ids, pad_id, device)
    prompt_lengths = torch.tensor([len(row) for row in prompt_ids])
    rows, width = prompts.shape
    mask = (torch.arange(width) >= width - prompt_lengths[:, None]).long().to(device)
    positions = position_ids(mask)
    seeds, eos = seeds.to(device), torch.tensor(list(eos_ids), device=device)
    cache = DynamicCache(config=model.model.config)
    alive = torch.ones(rows, dtype=torch.bool, device=device)
    input_ids, drawn, living = prompts, [], []
    with _evaluating(model.model), model.recording_trunk() as trunk:
        for t in range(sampling.max_length):
            logits = model.step(input_ids, mask, positions, cache)
            sampled = sample_tokens(
                logits,
                seeds,
                torch.full_like(seeds, t),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
            )
            drawn.append(sampled)
            living.append(alive)
            alive = alive & ~torch.isin(sampled.tokens, eos)
            if not alive.any():
                break
            input_ids = sampled.tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            positions = positions[:, -1:] + 1
    response_mask = torch.stack(living, dim=1)
    ids = torch.stack([s.tokens for s in drawn], dim=1).masked_fill(~response_mask, pad_id)
    return Decoded(
        Tokens(prompts, prompt_lengths, ids, response_mask.sum(dim=1).cpu()),
        torch.stack([s.logprobs for s in drawn], dim=1).masked_fill(~response_mask, 0.0),
        torch.stack([s.sampling_logprobs for s in drawn], dim=1).masked_fill(~response_mask, 0.0),
        ~alive.cpu(),
        nn.functional.pad(torch.cat(trunk, dim=1), (0, 0, 0, 1)) if trunk else None,
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode for the block: in train mode, gradient checkpointing makes
    transformers drop the KV cache."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
