"""The time of the parts of a PPO step, and the operations and bytes that each part needs.

Products of n tokens with weights W are 2 W n operations, as many again for the gradient of each
operand that has one; attention counts the keys that a token looks at. Padding is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ppo_fast import PPOTrainer
from ppo_fast.models.parts import body_of, layer_list
from ppo_fast.rollout.prompts import Prompts

BYTES = 4  # of a float32
# AdamW reads a weight, its gradient and two moments and writes three of them; clipping reads the
# gradient twice and writes it.
OPTIMIZER_NUMBERS = 7 + 3


class Clock:
    """Seconds by part: time in a part within another counts for the inner one only."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running: list[str] = ["rest"]
        self._since = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._note()
        self._running.append(name)
        try:
            yield
        finally:
            self._note()
            self._running.pop()

    def _note(self) -> None:
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def around(self, name: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed


def seconds_of_parts(trainer: PPOTrainer, step: Callable[[], None]) -> dict[str, float]:
    """Return the seconds of the parts of one ``step``; "rest" is what no part accounts for."""
    optimizers = [o for o in (trainer.policy_optimizer, trainer.value_optimizer) if o is not None]
    places = [
        ("prefill", Prompts, "read"),
        ("decode", trainer.engine, "generate"),
        ("score", trainer.scorer, "of_rollout"),
        ("reference", trainer.reference, "forward"),
        ("reference", trainer.reference, "logprobs"),
        *([("value", trainer.critic, "values")] if trainer.critic.trained else []),
        ("forward", trainer.policy, "forward"),
        ("forward", trainer.policy, "logprobs"),
        ("backward", Tensor, "backward"),
        ("optimizer", nn.utils, "clip_grad_norm_"),
        *(("optimizer", optimizer, "step") for optimizer in optimizers),
    ]
    clock = Clock()
    with ExitStack() as stack:
        for name, owner, method in places:
            timed = clock.around(name, getattr(owner, method))
            stack.enter_context(patch.object(owner, method, timed))
        with clock.part("rest"):
            step()
    names = dict.fromkeys(name for name, _, _ in places)
    return {name: clock.seconds[name] for name in (*names, "rest")}


class Work(NamedTuple):
    """Operations of a part, and the bytes that it must move where these may be the bound."""

    operations: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Llama: weights in the products of a layer and of the head, attention's widths."""

    layer: int
    layers: int
    head: int
    queries: int  # heads times their size
    keys: int

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        config: Any = model.config
        layers = layer_list(body_of(model))
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            sum(p.numel() for p in layers[0].parameters() if p.dim() == 2),
            len(layers),
            config.vocab_size * config.hidden_size,
            config.num_attention_heads * size,
            config.num_key_value_heads * size,
        )

    def through(self, first: int, end: int, layers: int) -> float:
        """Return the operations of a sequence's tokens ``first`` to ``end`` in some layers."""
        return layers * (2 * self.layer * (end - first) + 4 * self.queries * looks(first, end))


def looks(first: int, end: int) -> int:
    """Return how many keys tokens ``first`` to ``end`` look at: each its own and all before it."""
    return (end * (end + 1) - first * (first + 1)) // 2


def work_of_parts(trainer: PPOTrainer) -> dict[str, Work]:
    """Return the work of each part of the last step."""
    assert trainer.last_rollout is not None
    sizes, tokens = Sizes.of(trainer.policy_model), trainer.last_rollout.tokens
    lengths = list(
        zip(tokens.prompt_lengths.tolist(), tokens.response_lengths.tolist(), strict=True)
    )
    ids = map(tuple, (row.tolist() for row in tokens.sequences()))
    distinct = {row[:prompt] for row, (prompt, _) in zip(ids, lengths, strict=True)}
    responses, epochs = sum(new for _, new in lengths), trainer.config.num_epochs
    top = trainer.config.num_layers_unfrozen or sizes.layers
    heads = 2 * sizes.head * responses
    above = sum(sizes.through(0, prompt + new, top) for prompt, new in lengths)
    # the work of a head with one output is negligible
    value = above if trainer.critic.trained and not trainer.critic.reads_states else 0.0
    head = trainer.policy_model.get_output_embeddings()
    head_gradients = 1 + head.weight.requires_grad
    spans = [(prompt, prompt + new - 1) for prompt, new in lengths]
    return {
        "prefill": Work(
            sum(sizes.through(0, len(ids), sizes.layers) + 2 * sizes.head for ids in distinct)
        ),
        "decode": Work(
            sum(sizes.through(*span, sizes.layers) for span in spans)
            + 2 * sizes.head * (responses - len(lengths)),
            # weights once a step, and the keys and values that its tokens look at
            BYTES * (max(new for _, new in lengths) - 1) * (sizes.layers * sizes.layer + sizes.head)
            + BYTES * 2 * sizes.keys * sizes.layers * sum(looks(*span) for span in spans),
        ),
        "reference": Work(above + heads),
        "value": Work((1 + epochs) * value),
        "forward": Work(epochs * (above + heads)),
        "backward": Work(epochs * (2 * (above + value) + head_gradients * heads)),
        "optimizer": Work(bytes=BYTES * epochs * OPTIMIZER_NUMBERS * trained(trainer)),
    }


def trained(trainer: PPOTrainer) -> int:
    """Return the number of weights that optimizers change."""
    optimizers = [o for o in (trainer.policy_optimizer, trainer.value_optimizer) if o is not None]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return sum(p.numel() for group in groups for p in group["params"])


class Peaks(NamedTuple):
    """Peak rates of this machine: operations and copied bytes (read and written) a second."""

    operations: float
    bytes: float

    def rate(self, work: Work, seconds: float) -> str:
        """Return the rate that bounds ``work``, beside its peak; "" if there is no work."""
        if not any(work):
            return ""
        kinds = ("GFLOP/s", "GB/s")
        bounds = [amount / peak for amount, peak in zip(work, self, strict=True)]
        i = bounds.index(max(bounds))
        return f", {work[i] / seconds / 1e9:.3g} of {self[i] / 1e9:.3g} {kinds[i]}"


def measure_peaks(rounds: int = 5, size: int = 2048, copied: int = 2**26) -> Peaks:
    """Measure the peaks as test_bench_machine.py does."""
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    source, target = torch.randn(copied), torch.empty(copied)
    product = _median(lambda: torch.mm(a, b.T, out=out), rounds)
    copy = _median(lambda: target.copy_(source), rounds)
    return Peaks(2 * size**3 / product, 2 * source.nbytes / copy)


def _median(call: Callable[[], Any], rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
