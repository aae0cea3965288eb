"""Second derivatives, torch.func and forward mode: the kernels refuse, the reference computes."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from ppo_fast import ops

MASK = torch.tensor([[True, True, False], [True, True, True]])
LABELS = torch.tensor([[1, 3, 0], [2, 0, 4]])


HIDDEN, WEIGHT, TOKENS = (
    torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    for shape in ((2, 3, 5), (7, 5), (2, 3))
)


def logprobs_from_logits(x, impl):
    out = ops.logprobs_from_logits(x.expand(2, 3, 5).sin(), LABELS, mask=MASK, impl=impl)
    return out.logprobs.sum() + out.entropy.sum()


def linear_logprobs(x, impl):
    return ops.linear_logprobs(HIDDEN, WEIGHT * x, LABELS, mask=MASK, impl=impl).logprobs.sum()


def kl_estimate(x, impl):
    logprobs = -(x[:3].expand(2, 3) ** 2)
    return ops.kl_estimate(logprobs, TOKENS, mask=MASK, estimator="k3", impl=impl).sum()


def ppo_loss(x, impl):
    logprobs = -(x[:3].expand(2, 3) ** 2) / 20
    return ops.ppo_loss(
        logprobs,
        old_logprobs=-TOKENS.abs() / 20,
        advantages=TOKENS,
        mask=MASK,
        impl=impl,
    ).loss


def value_loss(x, impl):
    values = x[:3].expand(2, 3)
    none = torch.zeros(2, 3)
    return ops.value_loss(values, old_values=none, returns=none, mask=MASK, impl=impl).loss


def whiten(x, impl):
    return (ops.whiten(x[:3].expand(2, 3) * TOKENS, mask=MASK, impl=impl) ** 3).sum()


OPS = [logprobs_from_logits, linear_logprobs, kl_estimate, ppo_loss, value_loss, whiten]
ids = [op.__name__ for op in OPS]


def point():
    return torch.tensor([0.3, -0.5, 1.1, 0.2, -0.9], requires_grad=True)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("op", OPS, ids=ids)
def test_kernels_refuse_a_second_derivative(op):
    x = point()
    (slope,) = torch.autograd.grad(op(x, "auto"), x, create_graph=True)
    words = f"{op.__name__}: its kernels compute no second derivative .* impl='reference'"
    with pytest.raises(RuntimeError, match=words):
        slope.sum().backward(retain_graph=True)
    # another path leads to x: the kernel's must not be left out in silence
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(slope.sum() + x.square().sum(), x, allow_unused=True, retain_graph=True)
    x.grad = None
    op(x, "auto").backward(create_graph=True)
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(x.grad.sum(), x)


@pytest.mark.parametrize("op", OPS, ids=ids)
def test_first_derivative_is_the_same_with_and_without_a_graph(op):
    x = point()
    (expected,) = torch.autograd.grad(op(x, "auto"), x)
    (slope,) = torch.autograd.grad(op(x, "auto"), x, create_graph=True)
    assert torch.equal(slope, expected)


@pytest.mark.parametrize("op", OPS, ids=ids)
def test_reference_has_a_second_derivative(op):
    x = point().detach().double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: op(x, "reference"), x, atol=1e-4)


def test_few_row_linear_has_a_second_derivative():
    x, weight = point()[None].detach().requires_grad_(), WEIGHT[:3].clone().requires_grad_()
    y = ops.few_row_linear(x, weight, impl="cpp").square().sum()
    (slope,) = torch.autograd.grad(y, x, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(curve, 2 * (weight.T @ weight).sum(0, keepdim=True))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("op", OPS, ids=ids)
@pytest.mark.parametrize("impl", ["auto", "cpp"])
def test_transforms_are_refused_and_the_reference_takes_them(op, impl):
    x = point().detach()
    for transform in (torch.func.grad, lambda f: torch.func.vmap(lambda y: f(y[0]))):
        given = x if transform is torch.func.grad else x[None, None]
        with pytest.raises(RuntimeError, match=r"under torch\.func .* impl='reference'"):
            transform(lambda y: op(y, impl))(given)
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="under forward-mode autograd; use impl='reference'"),
    ):
        op(forward_ad.make_dual(x, x), impl)
    found = torch.func.grad(lambda y: op(y, "reference"))(x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(op(x, "reference"), x)
    torch.testing.assert_close(found, expected)
