"""Compute what an update on a GPU launches, computes and moves: padded, and without padding.

The learner trains models of true sizes on the meta device, where tensors have no values, and what
it computes is counted. The optimizer's step, which padding does not change, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from gpu_steps import MODELS
from gpu_works import nbytes
from recorded_ops import computes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from ppo_fast.config import PPOConfig
from ppo_fast.critics.make import make_critic
from ppo_fast.data.experience import Experience
from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.learning.learner import Learner
from ppo_fast.models import language_model, packed_attention
from ppo_fast.models.heads import ValueModel
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.passes import SWITCHED_OFF, Passes
from ppo_fast.models.probe import Probed, probe_tokens
from ppo_fast.ops.backends import library
from ppo_fast.ops.backends.impls import FASTEST

aten = torch.ops.aten
ARCHITECTURE = 90
# Of what they look up in, they read as much as they give.
LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather}
# What they change was not read before.
WRITING = {aten.copy_, aten.fill_, aten.zero_}
# Attention, and its products for each pair of a query and a key; backward, scores again.
ATTENTION = {
    "aten._scaled_dot_product_flash_attention": 2,
    "aten._scaled_dot_product_flash_attention_backward": 5,
    "torch_attn._varlen_attn": 2,
    "torch_attn._varlen_attn_backward": 5,
}


class Counts(NamedTuple):
    launches: int = 0
    tokens: int = 0
    """Those whose embeddings are looked up, with padding, for each pass."""
    bytes: float = 0.0
    """Read and written: the tensors of each kernel, once a kernel."""
    flops: float = 0.0
    """Of products and attention."""

    def plus(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class CountedOps(TorchDispatchMode):
    """Within the block, count what a GPU would do for operations on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self._copied: Any = WeakTensorKeyDictionary()  # copies of the CPU's tensors, and these

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(y) if isinstance(x, Tensor)] for y in (args, result))
        if not any(x.is_meta for x in given + made) or not computes(func):
            return result
        packet = func.overloadpacket
        if packet is aten._to_copy and not given[0].is_meta:
            self._copied[result] = given[0]
        moved = nbytes(made)
        if packet in LOOKUPS:
            moved += nbytes(made)
        elif packet not in WRITING:
            moved += nbytes(given)
        elif packet is aten.copy_:
            moved += nbytes(given[1:])
        tokens = made[0].shape[:-1].numel() if packet is aten.embedding else 0
        flops = self._flops(packet, given, made, args, kwargs or {})
        self.counts = self.counts.plus(Counts(1, tokens, moved, flops))
        return result

    def _flops(self, packet: Any, given: Any, made: Any, args: Any, kwargs: Any) -> float:
        if (name := str(packet)) not in ATTENTION:
            count = flop_registry.get(packet)
            return float(count(*args, **kwargs, out_val=made[0])) if count else 0.0
        if "varlen" in name:
            ends = [x for x in given if x in self._copied][:2]
            queries, keys = (self._copied[x].diff() for x in ends)
        else:
            rows, _, length, _ = given[0].shape
            queries = keys = torch.full((rows,), length, device="cpu")
        pairs = float((queries * keys - queries * (queries - 1) // 2).sum())
        _, heads, *_, size = given[0].shape  # of the query, or of the output's gradient
        return 2.0 * ATTENTION[name] * pairs * heads * size


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float, **options: Any
) -> Tensor:
    """Compute what F.scaled_dot_product_attention does, as on a GPU in half precision."""
    assert is_causal
    assert options.get("attn_mask") is None
    attend = aten._scaled_dot_product_flash_attention
    return attend(query, key, value, 0.0, True, scale=scale)[0]


@contextmanager
def on_a_gpu(*, packed: bool) -> Iterator[None]:
    """Within the block, models on the meta device are computed as on a GPU in half precision.

    What would read values is left out: checks of models, and the optimizer's step.
    """

    def probed(model: nn.Module) -> Probed:
        logits = torch.empty(1, 1, model.config.vocab_size, device="meta")
        return Probed(probe_tokens(model), logits, None)

    with ExitStack() as stack:
        for place, name, value in (
            (masking_utils, "find_packed_sequence_indices", lambda _: None),
            (language_model, "probe", probed),
            (language_model, "autocast_dtype", lambda _: None),
            (LanguageModel, "_fused_fails", lambda *_: None),
            (Passes, "_why_padded", lambda *_: None if packed else SWITCHED_OFF),
            (packed_attention, "_way", lambda _: packed_attention.varlen),
            (nn.functional, "scaled_dot_product_attention", _flash_attention),
            (library, "is_in_torch_dispatch_mode", lambda: False),
            (Learner, "_step", lambda *_: None),
        ):
            stack.enter_context(patch.object(place, name, value))
        stack.enter_context(patch.dict(FASTEST, {"meta": "triton"}))
        yield


class Work(NamedTuple):
    """Lengths of prompts and of responses of a batch; samples of one prompt follow one another."""

    prompts: list[int]
    responses: list[int]
    samples: int = 1

    def tokens(self) -> Tokens:
        """Return tokens of these lengths on the meta device."""
        prompts = [[row // self.samples] * n for row, n in enumerate(self.prompts)]
        tokens = make_tokens(prompts, [[0] * n for n in self.responses], 0, torch.device("cpu"))
        return tokens.to(torch.device("meta"))


def _evenly(first: int, last: int, count: int, stride: int) -> list[int]:
    """Return ``count`` whole numbers from ``first`` to ``last``, in the order of a stride."""
    return [first + (last - first) * (i * stride % count) // (count - 1) for i in range(count)]


WORKS = {
    "64 prompts of 8 to 256, responses of 8 to 128 tokens": Work(
        _evenly(8, 256, 64, 19), _evenly(8, 128, 64, 27)
    ),
    "8 samples of each of 4 prompts of 512, responses of 128 tokens": Work(
        [512] * 32, [128] * 32, samples=8
    ),
}
COLUMNS = ("tokens", "kernels", "GB", "TFLOP")
CRITICS = {"head": "a value head", "model": "a value model"}


def update_counts(work: Work, settings: dict[str, Any], critic: Any, *, packed: bool) -> Counts:
    """Count what one epoch of an update of a model takes, in one minibatch."""
    from stub_gpu import stub_gpu  # needs Triton, which tables of the report do not

    config = PPOConfig(critic=critic, padding_free=packed)
    with on_a_gpu(packed=packed), torch.device("meta"):
        policy = LanguageModel(_model(settings))
        value = ValueModel(_model(settings).model, policy.states_size).bfloat16()
        device = torch.device("meta")
        made = make_critic(critic, policy, value if critic == "model" else None, config, device)
        learner, experience = Learner(policy, made, config), _experience(work.tokens())
        with stub_gpu(ARCHITECTURE) as launched, CountedOps() as ops:
            learner.update(experience, policy_epochs=1, value_epochs=1, seed=0)
    kernels = Counts(len(launched), 0, sum(nbytes(it.arguments.values()) for it in launched))
    return ops.counts.plus(kernels)


def _model(settings: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).bfloat16()


def _experience(tokens: Tokens) -> Experience:
    numbers = torch.empty(tokens.response_ids.shape, device="meta")
    per_token = [numbers] * 3
    width, scores = numbers.shape[1], numbers[:, 0]
    return Experience(tokens, 1.0, width, *per_token, scores, *per_token, None, {})


def as_lines() -> list[dict[str, Any]]:
    """Return the updates as lines of the report."""
    lines = []
    for model in ("SmolLM2-135M", "Llama-3.1-8B"):
        for critic, text in CRITICS.items():
            for name, work in WORKS.items():
                padded, packed = (
                    update_counts(work, MODELS[model], critic, packed=packed)._asdict()
                    for packed in (False, True)
                )
                line = {"model": model, "critic": text, "work": name}
                lines.append(line | {"padded": padded, "packed": packed})
    return lines


def shown(line: dict[str, Any]) -> list[str]:
    """Return the cells of COLUMNS for a line of the report: padded / packed."""
    ways = [line["padded"], line["packed"]]
    cells = [
        [str(way["tokens"]) for way in ways],
        [str(way["launches"]) for way in ways],
        [_short(way["bytes"] / 1e9) for way in ways],
        [_short(way["flops"] / 1e12) for way in ways],
    ]
    return [" / ".join(cell) for cell in cells]


def _short(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"
