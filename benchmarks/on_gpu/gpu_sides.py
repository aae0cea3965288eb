"""The works that test_bench_gpu.py times on a GPU: ours, and others' where those are installed.

A work is made on the default device. Sizes are arguments, and so is ``impl``: a test makes small
ones and runs their sides where there is no GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import eager
import torch
import torch.nn.functional as F
from gpu_steps import MODELS
from plain_ppo import generate
from sides import Side
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_fast import ops
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout import LocalEngine, Sampling

EAGER = "eager, log_softmax and gather"
COMPILED = "torch.compile of the reference"


class GpuWork(NamedTuple):
    work: str
    bytes: int
    """The bytes that it must move at least; 0 where products take most of the time."""
    sides: dict[str, Side | str]
    """Ours first. A string instead of a side says why there is none."""


def installed(module: str, name: str, then: Callable[[Any], Side]) -> Side | str:
    """Return ``then(module.name)``, or why it cannot be imported."""
    try:
        return then(getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError) as error:
        return f"not installed ({error})"


def with_gradient(side: Side | str, inputs: Iterable[Tensor], coefficients: Tensor) -> Side | str:
    """Return a side of forward and backward; coefficients[i] is the gradient of output i."""
    if isinstance(side, str):
        return side

    def both() -> Any:
        outputs = side()
        given = [c.to(x.dtype).view_as(x) for c, x in zip(coefficients, outputs, strict=False)]
        return torch.autograd.grad(outputs, tuple(inputs), given)

    return both


def logprobs(rows: int, vocab: int, *, backward: bool, impl: Any = "triton") -> GpuWork:
    """Make the work of logprobs_from_logits on bfloat16 logits."""
    logits = (3 * torch.randn(rows, vocab)).bfloat16().requires_grad_(backward)
    labels, coefficients = torch.randint(vocab, (rows,)), torch.randn(2, rows)

    def ours(impl: Any) -> tuple[Tensor, ...]:
        return tuple(ops.logprobs_from_logits(logits, labels, impl=impl))

    sides: dict[str, Side | str] = {
        "ppo_fast": partial(ours, impl),
        EAGER: partial(eager.by_log_softmax, logits, labels, True),
        COMPILED: partial(torch.compile(ours), "reference"),
        "TRL, selective_log_softmax_and_entropy": installed(
            "trl.trainer.utils",
            "selective_log_softmax_and_entropy",
            lambda trl: partial(trl, logits[None], labels[None]),
        ),
    }
    what, moved = f"logprobs_from_logits, {rows} x {vocab} bfloat16", logits.nbytes
    if backward:
        sides = {name: with_gradient(side, [logits], coefficients) for name, side in sides.items()}
        what, moved = f"{what}, forward and backward", 3 * moved
    return GpuWork(what, moved, sides)


def linear(
    tokens: int, vocab: int, hidden: int, *, entropy: bool, frozen: bool, impl: Any = "triton"
) -> GpuWork:
    """Make the work of linear_logprobs in bfloat16, forward and backward."""
    states = torch.randn(tokens, hidden).bfloat16().requires_grad_()
    weight = (3 * torch.randn(vocab, hidden) / hidden**0.5).bfloat16().requires_grad_(not frozen)
    labels, coefficients = torch.randint(vocab, (tokens,)), torch.randn(2, tokens)

    def ours(impl: Any, budget: int) -> tuple[Tensor, ...]:
        out = ops.linear_logprobs(
            states, weight, labels, entropy=entropy, logits_budget_bytes=budget, impl=impl
        )
        return tuple(out) if entropy else (out.logprobs,)

    def by_trl(function: Any) -> Side:
        asked = ("entropy",) if entropy else ()
        arguments = (states, weight, None, labels, 1.0, 32768, None, 1.0, asked)
        return lambda: function.apply(*arguments)[: 1 + entropy]

    def by_loss(cross_entropy: Any) -> Side:
        return lambda: (-cross_entropy(states, weight, labels, reduction="none"),)

    sides: dict[str, Side | str] = {
        "ppo_fast, logits kept": partial(ours, impl, 4 * tokens * vocab),
        "ppo_fast, logits recomputed": partial(ours, impl, 0),
        EAGER: lambda: eager.by_log_softmax(states @ weight.T, labels, entropy),
        COMPILED: partial(torch.compile(ours), "reference", 0),
        "TRL, ChunkedLogProbFunction": installed(
            "trl.kernels.chunked_logprob", "ChunkedLogProbFunction", by_trl
        ),
    }
    if not entropy:  # these have no entropy
        sides["Liger, fused_linear_cross_entropy"] = installed(
            "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", by_loss
        )
        sides["cut-cross-entropy"] = installed("cut_cross_entropy", "linear_cross_entropy", by_loss)
    inputs = [states] if frozen else [states, weight]
    head = "frozen head" if frozen else "trained head"
    what = "with entropy" if entropy else "log-prob alone"
    return GpuWork(
        f"linear_logprobs, {tokens} x {hidden} x {vocab} bfloat16, forward and backward, "
        f"{what}, {head}",
        0,
        {name: with_gradient(side, inputs, coefficients) for name, side in sides.items()},
    )


def losses(rows: int, steps: int, *, impl: Any = "triton") -> GpuWork:
    """Make the work of both losses with the terms of test_bench_losses.py, with backward."""
    mask = torch.arange(steps) < torch.randint(1, steps + 1, (rows, 1))
    logprobs, values = -5 * torch.rand(rows, steps), torch.randn(rows, steps)
    near = [x + 0.2 * torch.randn(rows, steps) for x in (logprobs, logprobs, values)]
    old_logprobs, ref_logprobs, old_values = near
    advantages, returns = torch.randn(2, rows, steps)
    entropy = torch.rand(rows, steps)
    inputs = [x.requires_grad_() for x in (logprobs, entropy, values)]
    of_policy = {"old_logprobs": old_logprobs, "advantages": advantages, "mask": mask}
    of_policy |= {"ref_logprobs": ref_logprobs}
    of_value = {"old_values": old_values, "returns": returns}

    def ours(impl: Any) -> tuple[Tensor, ...]:
        policy = ops.ppo_loss(
            logprobs,
            entropy=entropy,
            dual_clip=3.0,
            kl_coef=0.05,
            entropy_coef=0.01,
            impl=impl,
            **of_policy,
        )
        value = ops.value_loss(values, mask=mask, clip=0.2, impl=impl, **of_value)
        return (policy.loss + value.loss,)

    def by_hand() -> tuple[Tensor, ...]:
        return (eager.losses(logprobs, entropy, values, **of_policy, **of_value),)

    sides: dict[str, Side | str] = {
        "ppo_fast": partial(ours, impl),
        "eager with all metrics: the reference": partial(ours, "reference"),
        COMPILED: partial(torch.compile(ours), "reference"),
        "eager without metrics": by_hand,
        "torch.compile of that without metrics": torch.compile(by_hand),
    }
    one = torch.ones(1)
    return GpuWork(
        f"ppo_loss + value_loss, {rows} x {steps}, forward and backward",
        (8 * 4 + 2 * 1 + 3 * 4) * mask.numel(),  # floats read, masks, gradients
        {name: with_gradient(side, inputs, one) for name, side in sides.items()},
    )


def gae(rows: int, steps: int, *, impl: Any = "triton") -> GpuWork:
    rewards, values = torch.randn(2, rows, steps)
    mask = torch.arange(steps) < torch.randint(1, steps + 1, (rows, 1))

    def ours(impl: Any) -> Any:
        return ops.gae(rewards, values, mask=mask, gamma=1.0, lam=0.95, impl=impl)

    sides: dict[str, Side | str] = {
        "ppo_fast": partial(ours, impl),
        "Python loop over T with mask: the reference": partial(ours, "reference"),
        "Python loop over T, no mask": partial(eager.loop_over_steps, rewards, values, 1.0, 0.95),
    }
    return GpuWork(f"gae, {rows} x {steps}, ragged mask", 17 * mask.numel(), sides)


def sample(rows: int, vocab: int, *, impl: Any = "triton") -> GpuWork:
    logits = 3 * torch.randn(rows, vocab)
    seeds, positions = torch.arange(rows), torch.full((rows,), 7)

    def ours(impl: Any) -> Any:
        return ops.sample_tokens(logits, seeds, positions, impl=impl)

    sides: dict[str, Side | str] = {
        "ppo_fast": partial(ours, impl),
        "softmax, torch.multinomial, gather": partial(eager.by_multinomial, logits),
        "softmax / exponential, argmax": partial(eager.by_exponential, logits),
        "torch.compile of softmax / exponential, argmax": partial(
            torch.compile(eager.by_exponential), logits
        ),
    }
    return GpuWork(f"sample_tokens, {rows} x {vocab}", logits.nbytes, sides)


def attention(
    rows: int, columns: int, heads: int, kv_heads: int, head_size: int, *, impl: Any = "triton"
) -> GpuWork:
    """Make the work of decode_attention in bfloat16; each row sees all columns but one."""
    query = torch.randn(rows, heads, head_size).bfloat16()
    keys, values = torch.randn(2, rows, columns, kv_heads, head_size).bfloat16()
    lengths, scaling = torch.full((rows,), columns - 1), head_size**-0.5
    mask = (torch.arange(columns) < columns - 1).expand(rows, 1, 1, columns)

    def ours(impl: Any) -> Any:
        return ops.decode_attention(query, keys, values, lengths, scaling=scaling, impl=impl)

    def by_copies() -> Tensor:
        """Attend as transformers does where there is a mask."""
        k, v = (x.repeat_interleave(heads // kv_heads, 2).transpose(1, 2) for x in (keys, values))
        return F.scaled_dot_product_attention(query[:, :, None], k, v, mask, scale=scaling)

    def by_groups() -> Tensor:
        q = query.view(rows, kv_heads, heads // kv_heads, head_size)
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling)

    sides: dict[str, Side | str] = {
        "ppo_fast": partial(ours, impl),
        "scaled_dot_product_attention, keys copied to all heads": by_copies,
        "scaled_dot_product_attention, a group's queries as rows": by_groups,
    }
    what = f"decode_attention, {rows} x {columns}, {heads} heads of {head_size} on {kv_heads}"
    return GpuWork(f"{what}, bfloat16", 2 * keys.nbytes, sides)


def decoding(settings: dict[str, Any], rows: int, prompt: int, new: int) -> GpuWork:
    """Make the work of a rollout of a model with random bfloat16 weights, and of ``generate``."""
    config = AutoConfig.for_model(**settings, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    prompts = torch.randint(2, config.vocab_size, (rows, prompt))
    policy, seeds = LanguageModel(model), torch.arange(rows)

    def ours(cuda_graphs: bool) -> Any:
        engine = LocalEngine(policy, eos_ids=list, pad_id=0, cuda_graphs=cuda_graphs)
        return engine.generate(prompts.tolist(), Sampling(new), seeds=seeds)

    sides: dict[str, Side | str] = {
        "ppo_fast": partial(ours, cuda_graphs=True),
        "ppo_fast without CUDA graphs": partial(ours, cuda_graphs=False),
        "transformers generate": partial(generate, model, prompts, torch.ones_like(prompts), new),
    }
    return GpuWork(f"decoding, {rows} prompts of {prompt}, {new} new tokens each", 0, sides)


HEAD = (4096, 128256, 4096)  # tokens, vocabulary, hidden size
WORKS = {
    "logprobs forward": partial(logprobs, 8192, 151936, backward=False),
    "logprobs forward and backward": partial(logprobs, 8192, 151936, backward=True),
    "linear, with entropy": partial(linear, *HEAD, entropy=True, frozen=False),
    "linear, log-prob alone": partial(linear, *HEAD, entropy=False, frozen=False),
    "linear, frozen head": partial(linear, *HEAD, entropy=True, frozen=True),
    "losses": partial(losses, 512, 2048),
    "gae, 64 x 1024": partial(gae, 64, 1024),
    "gae, 8192 x 2048": partial(gae, 8192, 2048),
    "sample": partial(sample, 64, 151936),
    "attention, 32 x 256": partial(attention, 32, 256, 9, 3, 64),
    "attention, 32 x 2048": partial(attention, 32, 2048, 32, 8, 128),
    "attention, 4 x 8192": partial(attention, 4, 8192, 32, 8, 128),
    "decoding": partial(decoding, MODELS["SmolLM2-135M"], 32, 128, 128),
}
