"""Example calls of every op's Triton launchers, for the tests and the report.

    CASES["logprobs_forward"].run(512, 49152, torch.bfloat16)

A case stands for one set of options that compiles code of its own. Its launcher is called the way
``library`` calls it, on tensors of the default device that are the same in every run. On the CPU
that takes Triton's interpreter, or ``stub_gpu``, under which nothing is computed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALF_TOO = (torch.float32, torch.bfloat16, torch.float16)
HIDDEN = 64  # the hidden size of linear_logprobs' examples
TEMPERATURE = 0.7


class Example:
    """Draws the tensors of a call: [rows, columns] is [N, V] for an op on logits, else [B, T].

    Aligned tensors start on 16 bytes, and so do their rows where ``columns`` allows it. The others
    are slices that start an element later, logits within longer rows.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, aligned: bool) -> None:
        self.rows, self.columns, self.dtype, self.aligned = rows, columns, dtype, aligned
        self._random = torch.Generator(device=torch.get_default_device()).manual_seed(0)

    def logits(self) -> Tensor:
        if self.aligned:
            return (torch.randn(self.rows, self.columns, generator=self._random) * 4).to(self.dtype)
        wider = torch.randn(self.rows, self.columns + 3, generator=self._random) * 4
        return wider.to(self.dtype)[:, 1 : self.columns + 1]

    def floats(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Draw float32 numbers of shape [rows, columns], or ``shape``."""
        return self._placed(shape, lambda n: torch.randn(n, generator=self._random) * scale)

    def mask(self, *shape: int) -> Tensor:
        """Draw a mask that is True at seven elements in ten."""
        return self._placed(shape, lambda n: torch.rand(n, generator=self._random) < 0.7)

    def ints(self, end: int, *shape: int) -> Tensor:
        return self._placed(shape, lambda n: torch.randint(end, (n,), generator=self._random))

    def softmax(self, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return entropies [N] and statistics [N, 2], as logprobs_forward does."""
        if logits.shape[-1] == 0:
            return logits.new_zeros(len(logits)), logits.new_zeros(len(logits), 2)
        maximum = logits.float().amax(-1)
        total = ((logits.float() - maximum[:, None]) / temperature).exp().sum(-1)
        log_p = torch.log_softmax(logits.float() / temperature, -1)
        return -(log_p.exp() * log_p).sum(-1), torch.stack([maximum, total], -1)

    def _placed(self, shape: tuple[int, ...], draw: Callable[[int], Tensor]) -> Tensor:
        shape = shape or (self.rows, self.columns)
        count, later = torch.Size(shape).numel(), 0 if self.aligned else 1
        return draw(count + later)[later:].view(shape)


class Case(NamedTuple):
    launcher: str
    """Folder of the op, function of its triton.py."""
    arguments: Callable[[Example], tuple[Any, ...]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    common: bool = True
    """What an update or a rollout calls by default; the other cases are options of it."""

    def prepare(self, example: Example) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the launcher and its arguments."""
        folder, _, function = self.launcher.partition("/")
        module = importlib.import_module(f"ppo_fast.ops.{folder}.triton")
        return getattr(module, function), self.arguments(example)

    def run(
        self, rows: int, columns: int, dtype: torch.dtype = torch.float32, *, aligned: bool = True
    ) -> Any:
        """Call the launcher and return its outputs."""
        launcher, arguments = self.prepare(Example(rows, columns, dtype, aligned))
        return launcher(*arguments)


def _logprobs_forward(e: Example, *, masked: bool = False, entropy: bool = True) -> tuple[Any, ...]:
    logits, labels = e.logits(), e.ints(e.columns, e.rows)
    mask = e.mask(e.rows) if masked else None
    return logits, labels, mask, TEMPERATURE, entropy


def _logprobs_backward(
    e: Example, *, masked: bool = False, entropy: bool = True
) -> tuple[Any, ...]:
    logits, labels, mask, t, _ = _logprobs_forward(e, masked=masked, entropy=entropy)
    a, b = e.floats(e.rows), e.floats(e.rows) if entropy else None
    return logits, labels, mask, t, *e.softmax(logits, t), a, b


def _linear_forward(e: Example, *, plain: bool = True) -> tuple[Any, ...]:
    hidden, weight = e.floats(e.rows, HIDDEN), e.floats(e.columns, HIDDEN, scale=0.5)
    hidden, weight = hidden.to(e.dtype), weight.to(e.dtype)
    bias = None if plain else e.floats(e.columns).to(e.dtype)
    labels, mask = e.ints(e.columns, e.rows), None if plain else e.mask(e.rows)
    scale, softcap = (1.0, None) if plain else (0.5, 30.0)
    budget = 2**28 if plain else 0
    return hidden, weight, bias, labels, mask, TEMPERATURE, scale, softcap, True, budget


def _linear_backward(e: Example, *, plain: bool = True) -> tuple[Any, ...]:
    *head, _, budget = _linear_forward(e, plain=plain)
    hidden, weight, bias, _, _, t, scale, softcap = head
    logits = hidden.float() @ weight.float().T
    kept = logits.flatten()[: budget // 4]
    if bias is not None and softcap is not None:
        logits = softcap * torch.tanh((logits + bias.float()) * scale / softcap)
    needs = [True, True, not plain]
    stats = e.softmax(logits, t)
    return *head, *stats, kept, e.floats(e.rows), e.floats(e.rows), False, needs


def _kl_estimate(e: Example, estimator: str, *, masked: bool = True) -> tuple[Any, ...]:
    mask = e.mask() if masked else None
    return e.floats() - 2, e.floats() - 2, mask, estimator, True


def _ppo_loss(
    e: Example,
    *,
    plain: bool = False,
    aggregation: str,
    ratio: str = "token",
    objective: str = "clip",
) -> tuple[Any, ...]:
    """Return arguments with importance weights where the objective is not "clip"."""
    logprobs = e.floats() - 2
    old, advantages = logprobs + e.floats(scale=0.2), e.floats()
    entropy, ref = (None, None) if plain else (e.floats().abs(), e.floats() - 2)
    dual_clip, kl_coef, entropy_coef = (None, 0.0, 0.0) if plain else (3.0, 0.05, 0.01)
    numbers = 0.2, 0.25, dual_clip, kl_coef, "k1+k2", entropy_coef
    mask, of_gradients = e.mask(), 1 if plain else 2
    normalizer = None if plain else mask.sum()
    weights = None if objective == "clip" else e.floats().abs()
    return (
        *(logprobs, entropy, old, advantages, ref, weights, mask, ratio, objective),
        *(*numbers, aggregation, normalizer, of_gradients),
    )


def _value_loss(e: Example, *, plain: bool = False, huber: float | None = None) -> tuple[Any, ...]:
    mask = e.mask()
    old, clip, normalizer = (None, None, None) if plain else (e.floats(), 0.2, mask.sum())
    return e.floats(), old, e.floats(), mask, clip, huber, normalizer, 1


def _gae(e: Example, *, plain: bool = True) -> tuple[Any, ...]:
    mask, dones = (None, None) if plain else (e.mask(), e.ints(9) == 0)
    return e.floats(), e.floats(), mask, dones, e.floats(e.rows), e.floats(e.rows).sigmoid(), 0.99


def _whiten_backward(e: Example) -> tuple[Any, ...]:
    return e.floats(), e.floats(), e.mask(), e.floats(1).double().abs().squeeze(0)


def _sample_tokens(e: Example, *, top_k: int = 0, top_p: float = 1.0) -> tuple[Any, ...]:
    return e.logits(), e.ints(2**40, e.rows), e.ints(1000, e.rows), TEMPERATURE, top_k, top_p


def _decode_attention(
    e: Example,
    *,
    heads: int,
    kv_heads: int,
    head_size: int,
    window: int | None = None,
) -> tuple[Any, ...]:
    """Return arguments with part of a larger cache; not aligned, it starts an element later."""
    later = 0 if e.aligned else 1

    def drawn(*shape: int) -> Tensor:
        return e.floats(torch.Size(shape).numel() + later).to(e.dtype)[later:].view(shape)

    cache = e.rows + 1, e.columns + 3, kv_heads, head_size
    keys, values = (drawn(*cache)[: e.rows, : e.columns] for _ in range(2))
    lengths = e.ints(max(e.columns, 1), e.rows) + 1
    return drawn(e.rows, heads, head_size), keys, values, lengths, head_size**-0.5, window


CASES: dict[str, Case] = {
    "logprobs_forward": Case("logprobs/logprobs_forward", _logprobs_forward, HALF_TOO),
    "logprobs_forward, masked": Case(
        "logprobs/logprobs_forward",
        lambda e: _logprobs_forward(e, masked=True, entropy=False),
        HALF_TOO,
        common=False,
    ),
    "logprobs_backward": Case("logprobs/logprobs_backward", _logprobs_backward, HALF_TOO),
    "logprobs_backward, masked": Case(
        "logprobs/logprobs_backward",
        lambda e: _logprobs_backward(e, masked=True, entropy=False),
        HALF_TOO,
        common=False,
    ),
    "linear_logprobs_forward": Case(
        "linear_logprobs/linear_logprobs_forward", _linear_forward, HALF_TOO
    ),
    "linear_logprobs_forward, all options": Case(
        "linear_logprobs/linear_logprobs_forward",
        lambda e: _linear_forward(e, plain=False),
        HALF_TOO,
        common=False,
    ),
    "linear_logprobs_backward": Case(
        "linear_logprobs/linear_logprobs_backward", _linear_backward, HALF_TOO
    ),
    "linear_logprobs_backward, all options": Case(
        "linear_logprobs/linear_logprobs_backward",
        lambda e: _linear_backward(e, plain=False),
        HALF_TOO,
        common=False,
    ),
    "kl_estimate": Case("kl_estimate/kl_estimate", lambda e: _kl_estimate(e, "k1")),
    "kl_estimate abs": Case(
        "kl_estimate/kl_estimate", lambda e: _kl_estimate(e, "abs"), common=False
    ),
    "kl_estimate k2": Case(
        "kl_estimate/kl_estimate", lambda e: _kl_estimate(e, "k2"), common=False
    ),
    "kl_estimate k3": Case(
        "kl_estimate/kl_estimate", lambda e: _kl_estimate(e, "k3", masked=False)
    ),
    "kl_estimate k3 clamped": Case(
        "kl_estimate/kl_estimate", lambda e: _kl_estimate(e, "k3 clamped"), common=False
    ),
    "ppo_loss": Case("ppo_loss/ppo_loss", lambda e: _ppo_loss(e, aggregation="token-mean")),
    "ppo_loss by sequences": Case(
        "ppo_loss/ppo_loss", lambda e: _ppo_loss(e, aggregation="seq-mean-token-mean")
    ),
    "ppo_loss plain": Case(
        "ppo_loss/ppo_loss",
        lambda e: _ppo_loss(e, plain=True, aggregation="token-mean"),
        common=False,
    ),
    "ppo_loss cispo, by rows' products": Case(
        "ppo_loss/ppo_loss",
        lambda e: _ppo_loss(
            e, aggregation="token-mean", ratio="sequence-product", objective="cispo"
        ),
        common=False,
    ),
    "ppo_loss mask, by rows' means": Case(
        "ppo_loss/ppo_loss",
        lambda e: _ppo_loss(
            e, aggregation="seq-mean-token-mean", ratio="sequence", objective="mask"
        ),
        common=False,
    ),
    "value_loss": Case("value_loss/value_loss", _value_loss),
    "value_loss huber": Case(
        "value_loss/value_loss", lambda e: _value_loss(e, huber=0.5), common=False
    ),
    "value_loss plain": Case(
        "value_loss/value_loss", lambda e: _value_loss(e, plain=True), common=False
    ),
    "gae": Case("gae/gae", lambda e: _gae(e, plain=False)),
    "gae plain": Case("gae/gae", _gae, common=False),
    "whiten": Case("whiten/whiten", lambda e: (e.floats(), e.mask())),
    "whiten_backward": Case("whiten/whiten_backward", _whiten_backward),
    "sample_tokens": Case("sample_tokens/sample_tokens", _sample_tokens, HALF_TOO),
    "sample_tokens truncated": Case(
        "sample_tokens/sample_tokens",
        lambda e: _sample_tokens(e, top_k=5, top_p=0.9),
        HALF_TOO,
        common=False,
    ),
    "decode_attention": Case(
        "decode_attention/decode_attention",
        lambda e: _decode_attention(e, heads=9, kv_heads=3, head_size=64),
        HALF_TOO,
    ),
    "decode_attention, heads of 128": Case(
        "decode_attention/decode_attention",
        lambda e: _decode_attention(e, heads=28, kv_heads=4, head_size=128),
        HALF_TOO,
    ),
    "decode_attention, heads of 80, a window": Case(
        "decode_attention/decode_attention",
        lambda e: _decode_attention(e, heads=18, kv_heads=1, head_size=80, window=300),
        HALF_TOO,
        common=False,
    ),
    "decode_attention, heads of 256": Case(
        "decode_attention/decode_attention",
        lambda e: _decode_attention(e, heads=2, kv_heads=2, head_size=256),
        HALF_TOO,
        common=False,
    ),
}
