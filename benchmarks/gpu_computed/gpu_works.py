"""The works of the computed report, and times that others published for works of these sizes.

The published times were measured on others' kernels, not on ours.

Tensors are on the meta device: launchers see true sizes, and nothing is allocated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton_cases import CASES, Example

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a launcher, its arguments


class Work(NamedTuple):
    calls: Callable[[], Iterator[Call]]
    """Yields the launchers, to be called one after another."""
    elements: int
    """The elements by which its bytes are counted: logits, or tokens."""
    dtype: str
    published: dict[str, str]
    """Published times by GPU."""
    flops: float = 0.0
    """Operations of the products beside the kernels."""


class Blank(Example):
    """An Example whose tensors have no values."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.rows, self.columns, self.dtype, self.aligned = rows, columns, dtype, True

    def logits(self) -> Tensor:
        return self.floats().to(self.dtype)

    def floats(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape or (self.rows, self.columns), device="meta")

    def mask(self, *shape: int) -> Tensor:
        return self.floats(*shape).bool()

    def ints(self, end: int, *shape: int) -> Tensor:
        return self.floats(*shape).long()


def of_cases(
    names: str, rows: int, columns: int, dtype: torch.dtype = torch.float32, **published: str
) -> Work:
    """Make a work of cases in triton_cases, of size [rows, columns]."""

    def calls() -> Iterator[Call]:
        for name in names.split(" and "):
            folder, _, function = CASES[name].launcher.partition("/")
            module = importlib.import_module(f"ppo_fast.ops.{folder}.triton")
            yield getattr(module, function), CASES[name].arguments(Blank(rows, columns, dtype))

    return Work(calls, rows * columns, str(dtype).removeprefix("torch."), published)


def of_head(tokens: int, hidden: int, vocab: int, *, products: int, **published: str) -> Work:
    """Make a work of linear_logprobs with bfloat16 operands.

    It is the forward (1 product), or forward and backward with logits kept (3) or recomputed (4).
    """

    def calls() -> Iterator[Call]:
        from ppo_fast.ops.linear_logprobs import triton

        blank = Blank(tokens, hidden, torch.bfloat16)
        states, weight = blank.logits(), blank.floats(vocab, hidden).bfloat16()
        head = (states, weight, None, blank.ints(vocab, tokens), None, 1.0, 1.0, None)
        budget = 4 * tokens * (vocab + 8) if products == 3 else 0
        yield triton.linear_logprobs_forward, (*head, True, budget)
        if products > 1:
            of_tokens = [blank.floats(tokens, *more) for more in ((), (2,), (), ())]
            entropy, stats, *coefficients = of_tokens
            kept = blank.floats(min(tokens * vocab, budget // 4))
            rest = (entropy, stats, kept, *coefficients, False, [True, True, False])
            yield triton.linear_logprobs_backward, (*head, *rest)

    elements = tokens * vocab
    return Work(calls, elements, "bfloat16", published, 2.0 * products * elements * hidden)


def of_cache(rows: int, columns: int, heads: int, kv_heads: int, head_size: int) -> Work:
    """Make a work of decode_attention in bfloat16, where each row sees all columns.

    An element is a number of the keys or values.
    """

    def calls() -> Iterator[Call]:
        from ppo_fast.ops.decode_attention import triton

        blank = Blank(rows, columns, torch.bfloat16)
        query = blank.floats(rows, heads, head_size).bfloat16()
        cache = [blank.floats(rows, columns, kv_heads, head_size).bfloat16() for _ in range(2)]
        lengths = blank.ints(columns, rows)
        yield triton.decode_attention, (query, *cache, lengths, head_size**-0.5, None)

    return Work(calls, 2 * rows * columns * kv_heads * head_size, "bfloat16", {})


def nbytes(arguments: Iterable[Any]) -> int:
    """Return the bytes of the tensors among arguments, each once."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    distinct = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape): x for x in tensors}
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in distinct.values())


bf16_logits = partial(of_cases, dtype=torch.bfloat16)
FORWARD, BOTH = "logprobs_forward", "logprobs_forward and logprobs_backward"

WORKS = {
    "log-prob and entropy, forward, 8192 x 128256": bf16_logits(FORWARD, 8192, 128256),
    "log-prob and entropy, forward, 8192 x 151936": bf16_logits(
        FORWARD, 8192, 151936, H100="0.89 (TRL #7244, fused), 12.8 (its eager)"
    ),
    "log-prob and entropy, forward, 32768 x 151936": bf16_logits(FORWARD, 32768, 151936),
    "log-prob and entropy, forward, 8192 x 50257": bf16_logits(FORWARD, 8192, 50257),
    "log-prob and entropy, forward and backward, 8192 x 128256": bf16_logits(BOTH, 8192, 128256),
    "log-prob and entropy, forward and backward, 8192 x 151936": bf16_logits(BOTH, 8192, 151936),
    "log-prob and entropy, forward and backward, 32768 x 151936": bf16_logits(BOTH, 32768, 151936),
    "log-prob and entropy, forward and backward, 8192 x 50257": bf16_logits(BOTH, 8192, 50257),
    "log-prob and entropy, forward and backward, 8192 x 100000": bf16_logits(
        BOTH, 8192, 100000, H100="1.71 (Fast-LLM #466, GPU not named)"
    ),
    "linear_logprobs, 8192 x 2304 x 256000, forward": of_head(
        8192, 2304, 256000, products=1, A100="46.4 (cut-cross-entropy), 81.9 (eager)"
    ),
    "linear_logprobs, 8192 x 2304 x 256000, forward and backward, recomputed": of_head(
        8192,
        2304,
        256000,
        products=4,
        A100="134.8 (cut-cross-entropy, which skips small gradients), 208.8 (eager)",
    ),
    "linear_logprobs, 8192 x 4096 x 128256, forward and backward, kept": of_head(
        8192, 4096, 128256, products=3, A100="166.7 (Liger FLCE 0.4.2), 111.5 (eager)"
    ),
    "linear_logprobs, 4096 x 4096 x 128256, forward and backward, kept": of_head(
        4096, 4096, 128256, products=3, H200="18.06 (Liger CuTe), 17.33 (QuACK 0.6.1)"
    ),
    "linear_logprobs, 8192 x 4096 x 151936, forward and backward, kept": of_head(
        8192, 4096, 151936, products=3, H100="TRL #7244: 42 (products alone), 59 (eager)"
    ),
    "linear_logprobs, 8192 x 4096 x 151936, forward and backward, recomputed": of_head(
        8192, 4096, 151936, products=4, H100="TRL #7244: 167 (chunked_nll), 192 (Liger FLCE)"
    ),
    "gae, 64 x 1024": of_cases("gae", 64, 1024),
    "gae, 512 x 4096": of_cases("gae", 512, 4096),
    "gae, 8192 x 2048": of_cases("gae", 8192, 2048),
    "gae without mask and dones, 8192 x 2048": of_cases(
        "gae plain", 8192, 2048, H100="0.125 (rl-triton)"
    ),
    "ppo_loss, 512 x 2048": of_cases("ppo_loss", 512, 2048),
    "ppo_loss with the ratio of sequences, 512 x 2048": of_cases(
        "ppo_loss mask, by rows' means", 512, 2048
    ),
    "value_loss, 512 x 2048": of_cases("value_loss", 512, 2048),
    "kl_estimate, 512 x 2048": of_cases("kl_estimate", 512, 2048),
    "whiten, 512 x 2048": of_cases("whiten", 512, 2048),
    "whiten and backward, 512 x 2048": of_cases("whiten and whiten_backward", 512, 2048),
    "sample_tokens, 64 x 151936, noise in every block": of_cases("sample_tokens", 64, 151936),
    "sample_tokens with top_k and top_p, 64 x 151936, one pass of each search": of_cases(
        "sample_tokens truncated", 64, 151936
    ),
    "decode_attention, 32 x 256, 9 heads of 64 on 3": of_cache(32, 256, 9, 3, 64),
    "decode_attention, 32 x 2048, 32 heads of 128 on 8": of_cache(32, 2048, 32, 8, 128),
    "decode_attention, 4 x 8192, 32 heads of 128 on 8": of_cache(4, 8192, 32, 8, 128),
}
