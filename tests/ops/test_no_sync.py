"""An update on meta and fake tensors, where reading a value on the host raises an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from runnable import TRITON
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ppo_fast.ops import (
    decode_attention,
    gae,
    kl_estimate,
    linear_logprobs,
    logprobs_from_logits,
    ppo_loss,
    sample_tokens,
    value_loss,
    whiten,
)
from ppo_fast.ops.backends.impls import FASTEST, missing
from ppo_fast.ops.stats import PPO_STATS, VALUE_STATS, merge_stats

B, T, D, V = 3, 5, 8, 41
AGGREGATIONS = pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
pytestmark = pytest.mark.skipif(TRITON, reason="the interpreter takes CPU tensors alone")
needs_triton = pytest.mark.skipif(bool(missing("triton")), reason=str(missing("triton")))

Make = Callable[..., Tensor]


def update(make: Make, aggregation: str, impl: str) -> Tensor:
    """Run the ops of an update forward and backward; return the loss, which was not read.

    Without a GPU, fake CUDA tensors run forward only: neither autograd nor indexing accepts them,
    whatever PyTorch was built with.
    """
    hidden, weight, values = make(B, T, D), make(V, D), make(B, T)
    leaves = (hidden, weight, values) if has_autograd(hidden) else ()
    for leaf in leaves:
        leaf.requires_grad_()
    labels, mask = make(B, T, dtype=torch.int64), make(B, T, dtype=torch.bool)
    old, ref = make(B, T), make(B, T)
    rewards = make(B, T) - 0.05 * kl_estimate(old, ref, mask=mask, impl=impl)
    advantages, returns = gae(rewards, values.detach(), mask=mask, gamma=1.0, lam=0.95, impl=impl)
    policy = linear_logprobs(
        hidden, weight, labels, mask=mask, temperature=0.7, softcap=30.0, impl=impl
    )
    loss, metrics = ppo_loss(
        policy.logprobs,
        old_logprobs=old,
        advantages=whiten(advantages, mask=mask, impl=impl),
        mask=mask,
        entropy=policy.entropy,
        ref_logprobs=ref,
        dual_clip=3.0,
        kl_coef=0.1,
        entropy_coef=0.01,
        weights=old,
        ratio="sequence" if aggregation == "seq-mean-token-mean" else "token",
        aggregation=aggregation,
        normalizer=mask.sum(),
        impl=impl,
    )
    critic_loss, value_stats = value_loss(
        values, old_values=values.detach(), returns=returns, mask=mask, clip=0.2, impl=impl
    )
    assert metrics.device == value_stats.device == critic_loss.device == hidden.device
    if leaves:
        (loss + 0.5 * critic_loss).backward()
        assert all(x.grad.shape == x.shape and x.grad.device == x.device for x in leaves)
        assert merge_stats(PPO_STATS, [metrics, metrics]).device == hidden.device
        assert merge_stats(VALUE_STATS, [value_stats, value_stats]).device == hidden.device
    return loss


def has_autograd(tensor: Tensor) -> bool:
    return tensor.device.type != "cuda" or torch.cuda.is_available()


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@AGGREGATIONS
def test_an_update_reads_no_value_on_the_host(aggregation):
    loss = update(meta, aggregation, "auto")
    with pytest.raises(RuntimeError):  # reading a value on this device
        loss.item()


@needs_triton
@AGGREGATIONS
def test_the_launchers_of_an_update_read_no_value_on_the_host(aggregation, monkeypatch):
    from stub_gpu import stub_gpu

    monkeypatch.setitem(FASTEST, "meta", "triton")
    with stub_gpu(90) as launched:
        update(meta, aggregation, "auto")
    kernels = {launch.code.name for launch in launched}
    assert kernels >= {"gae_kernel", "tile_gradient_kernel", "ppo_loss_kernel", "whiten_kernel"}


def fake_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


@needs_triton
@pytest.mark.parametrize("impl", ["auto", "triton"])
@AGGREGATIONS
def test_an_update_on_a_gpu_reads_no_value_on_the_host(aggregation, impl):
    with FakeTensorMode():
        loss = update(fake_cuda, aggregation, impl)
        assert loss.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            loss.item()


def use_logits(make: Make, dtype: torch.dtype, impl: str) -> None:
    """Run the ops on logits, forward and backward as ``update`` does."""
    logits = make(B, T, V, dtype=dtype)
    logits.requires_grad_(has_autograd(logits))
    labels, mask = make(B, T, dtype=torch.int64), make(B, T, dtype=torch.bool)
    out = logprobs_from_logits(logits, labels, mask=mask, temperature=0.7, impl=impl)
    assert all(x.shape == (B, T) and x.device == logits.device for x in out)
    if logits.requires_grad:
        (out.logprobs + 0.1 * out.entropy).sum().backward()
        assert (logits.grad.shape, logits.grad.dtype) == (logits.shape, dtype)
        assert logits.grad.device == logits.device
    next_logits, seeds = make(T, V, dtype=dtype), make(T, dtype=torch.int64)
    for top_k, top_p in ((0, 1.0), (5, 0.9)):
        drawn = sample_tokens(next_logits, seeds, seeds, top_k=top_k, top_p=top_p, impl=impl)
        assert all(x.shape == (T,) and x.device == logits.device for x in drawn)
        assert [x.dtype for x in drawn] == [torch.int64, torch.float32, torch.float32]


@needs_triton
@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_on_logits_on_a_gpu_read_no_value_on_the_host(dtype, impl):
    with FakeTensorMode():
        use_logits(fake_cuda, dtype, impl)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launchers_on_logits_read_no_value_on_the_host(dtype, monkeypatch):
    from stub_gpu import stub_gpu

    monkeypatch.setitem(FASTEST, "meta", "triton")
    with stub_gpu(90) as launched:
        use_logits(meta, dtype, "auto")
    assert len(launched) >= 4


def attend(make: Make, dtype: torch.dtype, impl: str) -> None:
    """Run the attention of a decoding step."""
    query, lengths = make(B, 4, D, dtype=dtype), make(B, dtype=torch.int64)
    keys, values = (make(B, 600, 2, D, dtype=dtype) for _ in range(2))
    for window in (None, 5):
        out = decode_attention(query, keys, values, lengths, scaling=0.3, window=window, impl=impl)
        assert (out.shape, out.dtype, out.device) == (query.shape, dtype, query.device)


@needs_triton
@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_gpu_reads_no_value_on_the_host(dtype, impl):
    with FakeTensorMode():
        attend(fake_cuda, dtype, impl)


def test_the_reference_of_attention_reads_no_value_on_the_host():
    attend(meta, torch.float32, "reference")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launchers_of_attention_read_no_value_on_the_host(dtype, monkeypatch):
    from stub_gpu import stub_gpu

    monkeypatch.setitem(FASTEST, "meta", "triton")
    with stub_gpu(90) as launched:
        attend(meta, dtype, "auto")
    assert len(launched) == 4
