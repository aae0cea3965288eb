"""Log-probs from hidden states and an LM head, by ppo_fast and by PyTorch.

The benchmarks measure their time and memory. Every form takes (work, entropy) and returns
(log-probs,) or (log-probs, entropies).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import eager
import torch
import torch.nn.functional as F
from sides import HIDDEN, TOKENS, VOCAB
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions

from ppo_fast.ops import linear_logprobs

KEPT, RECOMPUTED = "ppo_fast, logits kept", "ppo_fast, logits recomputed"


class Work(NamedTuple):
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [N]
    coefficients: Tensor  # [2, N], dL/dl and dL/dH


def make_work(
    *, tokens: int = TOKENS, vocab: int = VOCAB, hidden: int = HIDDEN, frozen: bool = False
) -> Work:
    states = torch.randn(tokens, hidden).requires_grad_()
    weight = (torch.randn(vocab, hidden) / hidden**0.5 * 3).requires_grad_(not frozen)
    return Work(states, weight, torch.randint(vocab, (tokens,)), torch.randn(2, tokens))


def gradients(outputs: tuple[Tensor, ...], work: Work) -> tuple[Tensor, ...]:
    inputs = [x for x in (work.hidden, work.weight) if x.requires_grad]
    return torch.autograd.grad(outputs, inputs, tuple(work.coefficients[: len(outputs)]))


def ours(work: Work, entropy: bool, **options: Any) -> tuple[Tensor, ...]:
    out = linear_logprobs(work.hidden, work.weight, work.labels, entropy=entropy, **options)
    return tuple(out) if entropy else (out.logprobs,)


def by_hand(work: Work, entropy: bool, form: Any) -> tuple[Tensor, ...]:
    return form(work.hidden @ work.weight.T, work.labels, entropy)


def by_torch(work: Work, entropy: bool, **options: Any) -> tuple[Tensor, ...]:
    assert not entropy, "F.linear_cross_entropy has no entropy"
    arguments = (work.hidden, work.weight, work.labels)
    return (-F.linear_cross_entropy(*arguments, reduction="none", **options),)


# PyTorch's rule makes chunks of 4 rows here; 256 rows were the fastest of 16, 64, 128, 256 and 512.
CHUNKS = {
    "whole": None,
    "auto chunks": LinearCrossEntropyOptions(),
    "chunks of 256 rows": LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None),
}

OURS = {
    KEPT: partial(ours, impl="cpp"),
    RECOMPUTED: partial(ours, impl="cpp", logits_budget_bytes=0),
}
EAGER = {name: partial(by_hand, form=form) for name, form in eager.LOGPROBS.items()}
TORCH = {
    f"F.linear_cross_entropy, {name}": partial(by_torch, options=options)
    for name, options in CHUNKS.items()
}
HEADS = OURS | EAGER | TORCH
