from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logprob_truth import (
    assert_within_budget,
    true_logit_grad,
    true_logprobs,
)
from runnable import FLOATS, examples, generator, implementations
from torch._subclasses.fake_tensor import FakeTensorMode

from ppo_fast.ops.logprobs import TokenLogprobs, logprobs_from_logits

pytestmark = pytest.mark.parametrize("impl", implementations("logprobs_from_logits"))

LAYOUTS = ["contiguous", "sliced", "transposed", "every other row"]


def layout_of(values: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same [N, V] numbers with other strides."""
    n, v = values.shape
    if layout == "sliced":
        base = values.new_full((n, v + 3), math.nan)
        base[:, 1 : v + 1] = values
        return base[:, 1 : v + 1]
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "every other row":
        base = values.new_full((2 * n, v), math.nan)
        base[::2] = values
        return base[::2]
    return values


def eager(logits, labels, mask, t, a, b):
    """Compute outputs and gradient in plain PyTorch, on inputs converted to float32."""
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x = torch.where(mask[:, None], logits.detach(), 0.0).to(work).requires_grad_()
    log_p = torch.log_softmax(x / t, -1)
    l = log_p.gather(-1, labels.where(mask, torch.tensor(0))[:, None])[:, 0]  # noqa: E741
    l, h = l * mask, -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1) * mask  # noqa: E741
    grad = torch.autograd.grad((l * a + h * b).sum(), x)[0]
    return l, h, grad


def hold_against_truth(logits, labels, mask, t, impl, *, pass_mask=True, seed=0):
    """Compare outputs and gradient with float64, for random upstream gradients."""
    a, b = torch.randn(2, len(logits), generator=generator(seed))
    before = logits.detach().clone()
    logits = logits.detach().requires_grad_()
    out = logprobs_from_logits(
        logits, labels, mask=mask if pass_mask else None, temperature=t, impl=impl
    )
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert out.logprobs.dtype == out.entropy.dtype == work
    a, b = a.to(work), b.to(work)
    (grad,) = torch.autograd.grad([out.logprobs, out.entropy], logits, [a, b])
    assert grad.dtype == logits.dtype
    l, h = true_logprobs(logits, labels, mask, t)  # noqa: E741
    eager_l, eager_h, eager_grad = eager(logits, labels, mask, t, a, b)
    assert_within_budget(out.logprobs, eager_l, l)
    assert_within_budget(out.entropy, eager_h, h)
    assert_within_budget(grad, eager_grad, true_logit_grad(logits, labels, mask, t, a, b))
    assert (out.logprobs[~mask] == 0).all()
    assert (out.entropy[~mask] == 0).all()
    assert (grad[~mask] == 0).all()
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0, equal_nan=True)
    return out, grad


@settings(max_examples=examples(60))
@given(
    n=st.sampled_from([0, 1, 2, 7]),
    v=st.sampled_from([1, 2, 41, 423, 507]),
    layout=st.sampled_from(LAYOUTS),
    masking=st.sampled_from(["not given", "none masked", "all masked", "some masked"]),
    t=st.sampled_from([1.0, 0.7, 2.5]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
)
def test_against_float64(impl, n, v, layout, masking, t, dtype, seed):
    g = generator(seed)
    values = (torch.randn(n, v, generator=g, dtype=torch.float64) * 4).to(dtype)
    labels = torch.randint(v, (n,), generator=g)
    mask = torch.ones(n, dtype=torch.bool)
    if masking == "all masked":
        mask[:] = False
    if masking == "some masked":
        mask = torch.rand(n, generator=g) < 0.5
    values[~mask] = math.nan
    labels[~mask] = -100
    logits = layout_of(values, layout)
    pass_mask = masking != "not given"
    hold_against_truth(logits, labels, mask, t, impl, pass_mask=pass_mask, seed=seed)


def test_the_vocabulary_of_gpt2(impl):
    logits = torch.randn(3, 50257, generator=generator(0)) * 5
    labels, mask = torch.tensor([0, 50256, 777]), torch.ones(3, dtype=torch.bool)
    hold_against_truth(logits, labels, mask, 1.0, impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [507, 5003])  # within one block of a kernel, and over several
def test_rows_that_break_online_softmax(impl, v, dtype):
    base = torch.randn(6, v, generator=generator(1))
    base[0, : v * 3 // 5] = -math.inf  # the first blocks hold nothing
    base[1, :-1] = -math.inf  # one token is left
    base[2] -= 200 - base[2].amax()  # a running maximum that starts at 0 is never replaced
    base[3] += 1e4
    base[4] -= 1e4
    base[5, ::2] = -math.inf
    labels = torch.tensor([v - 100, v - 1, 3, 5, 7, 1])
    mask = torch.ones(6, dtype=torch.bool)
    out, grad = hold_against_truth(base.to(dtype), labels, mask, 1.3, impl)
    assert out.logprobs.isfinite().all()
    assert (grad[base == -math.inf] == 0).all()
    assert out.logprobs[1] == 0
    assert out.entropy[1] == 0


def test_label_of_probability_zero(impl):
    logits = torch.tensor([[-math.inf, 1.0, 2.0]], requires_grad=True)
    out = logprobs_from_logits(logits, torch.tensor([0]), temperature=2.0, impl=impl)
    assert out.logprobs.item() == -math.inf
    (grad,) = torch.autograd.grad(out.logprobs, logits, torch.tensor([3.0]))
    p = torch.softmax(torch.tensor([-math.inf, 0.5, 1.0]), -1)
    torch.testing.assert_close(grad, 1.5 * (torch.tensor([[1.0, 0.0, 0.0]]) - p))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_rows_are_zero_whatever_they_hold(impl, poison):
    logits = torch.randn(3, 41)
    logits[1] = poison
    logits.requires_grad_()
    labels, mask = torch.tensor([3, -100, 4]), torch.tensor([True, False, True])
    out = logprobs_from_logits(logits, labels, mask=mask, impl=impl)
    # A loss that turns into NaN at the masked token does not reach the logits either.
    upstream = torch.tensor([1.0, math.nan, 2.0])
    torch.autograd.backward([out.logprobs, out.entropy], [upstream, upstream])
    assert out.logprobs[1] == 0
    assert out.entropy[1] == 0
    assert (logits.grad[1] == 0).all()
    assert logits.grad.isfinite().all()


def test_no_token_is_more_than_certain(impl):
    logits = (torch.randn(50, 423) * 30).bfloat16()
    out = logprobs_from_logits(logits, logits.argmax(-1), impl=impl)
    assert (out.logprobs <= 0).all()
    assert (out.entropy >= 0).all()


def test_uniform_rows_have_known_values(impl):
    out = logprobs_from_logits(torch.full((2, 41), 7.0), torch.tensor([0, 40]), impl=impl)
    torch.testing.assert_close(out.logprobs, torch.full((2,), -math.log(41)))
    torch.testing.assert_close(out.entropy, torch.full((2,), math.log(41)))


@pytest.mark.parametrize("used", ["logprobs", "entropy"])
def test_gradient_of_one_output_alone(impl, used):
    logits, labels = torch.randn(4, 41, requires_grad=True), torch.tensor([0, 5, 40, 7])
    mask, c, zero = torch.ones(4, dtype=torch.bool), torch.randn(4), torch.zeros(4)
    out = logprobs_from_logits(logits, labels, impl=impl)
    (grad,) = torch.autograd.grad(getattr(out, used), logits, c)
    a, b = (c, zero) if used == "logprobs" else (zero, c)
    truth = true_logit_grad(logits, labels, mask, 1.0, a, b)
    torch.testing.assert_close(grad.double(), truth, rtol=0, atol=1e-6)


def test_entropy_only_when_asked_for(impl):
    logits, labels = torch.randn(4, 41, requires_grad=True), torch.tensor([0, 5, 40, 7])
    out = logprobs_from_logits(logits, labels, entropy=False, impl=impl)
    assert isinstance(out, TokenLogprobs)
    assert out.entropy is None
    both = logprobs_from_logits(logits, labels, impl=impl)
    assert torch.equal(out.logprobs, both.logprobs)
    c = torch.randn(4)
    (grad,) = torch.autograd.grad(out.logprobs, logits, c)
    truth = true_logit_grad(logits, labels, torch.ones(4, dtype=torch.bool), 1.0, c, 0 * c)
    torch.testing.assert_close(grad.double(), truth, rtol=0, atol=1e-6)


def test_backward_twice_gives_the_same_gradient(impl):
    logits = torch.randn(3, 41, requires_grad=True)
    out = logprobs_from_logits(logits, torch.tensor([1, 2, 3]), impl=impl)
    loss = (out.logprobs * torch.tensor([1.0, -2.0, 0.5])).sum() + 0.3 * out.entropy.sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)


def test_no_graph_without_requires_grad(impl):
    out = logprobs_from_logits(torch.randn(2, 41), torch.tensor([0, 1]), impl=impl)
    assert not out.logprobs.requires_grad
    assert not out.entropy.requires_grad


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(impl, masked):
    if impl != "reference":
        pytest.skip("finite differences are for the float64 reference")
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (2, 3))
    mask = torch.tensor([[True, False, True], [False, True, True]]) if masked else None

    def outputs(x):
        return tuple(logprobs_from_logits(x, labels, mask=mask, temperature=0.8, impl=impl))

    assert torch.autograd.gradcheck(outputs, logits)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (2, 0)])
def test_leading_dimensions(impl, lead):
    logits, labels = torch.randn(*lead, 41), torch.randint(41, lead)
    out = logprobs_from_logits(logits, labels, impl=impl)
    l, h = true_logprobs(logits, labels, torch.ones(lead, dtype=torch.bool), 1.0)  # noqa: E741
    torch.testing.assert_close(out.logprobs.double(), l, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), h, rtol=0, atol=1e-5)


def test_a_row_has_the_same_bits_alone_and_in_a_batch(impl):
    logits, labels = torch.randn(9, 423) * 4, torch.randint(423, (9,))
    together = logprobs_from_logits(logits, labels, impl=impl)
    for i in range(9):
        alone = logprobs_from_logits(logits[i : i + 1], labels[i : i + 1], impl=impl)
        assert torch.equal(alone.logprobs[0], together.logprobs[i])
        assert torch.equal(alone.entropy[0], together.entropy[i])


def test_compiles_as_one_graph(impl):
    compiled = torch.compile(logprobs_from_logits, fullgraph=True, backend="aot_eager")
    labels, mask = torch.tensor([3, -100, 40]), torch.tensor([True, False, True])
    logits = torch.randn(3, 41, requires_grad=True)
    for t in (1.0, 0.7, 1.9):
        grads = []
        for function in (compiled, logprobs_from_logits):
            out = function(logits, labels, mask=mask, temperature=t, impl=impl)
            grads.append(
                (*out, torch.autograd.grad(out.logprobs.sum() + out.entropy[0], logits)[0])
            )
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected)


def test_runs_on_meta_and_fake_tensors(impl):
    if impl == "reference":
        logits = torch.randn(2, 3, 41, device="meta", dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(2, 3, dtype=torch.int64, device="meta")
        out = logprobs_from_logits(logits, labels, mask=labels == 0, impl=impl)
        (out.logprobs + out.entropy).sum().backward()
        assert logits.grad.shape == (2, 3, 41)
        assert out.logprobs.dtype == torch.float32
    with FakeTensorMode():
        labels = torch.zeros(5, dtype=torch.int64)
        out = logprobs_from_logits(torch.randn(5, 41), labels, mask=labels == 0, impl=impl)
        assert out.entropy.shape == (5,)


def test_autocast_changes_nothing(impl):
    logits, labels = torch.randn(3, 41), torch.tensor([3, 0, 40])
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        inside = logprobs_from_logits(logits, labels, impl=impl)
    outside = logprobs_from_logits(logits, labels, impl=impl)
    assert torch.equal(inside.logprobs, outside.logprobs)
    assert torch.equal(inside.entropy, outside.entropy)


LOGITS, LABELS = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((LOGITS.long(), LABELS), {}, TypeError, "logits: got torch.int64"),
        ((LOGITS[:, :0], LABELS), {}, ValueError, r"logits: got shape \(2, 0\)"),
        ((LOGITS, LABELS.int()), {}, TypeError, r"labels: got torch.int32.*\.long\(\)"),
        ((LOGITS, LABELS[:1]), {}, ValueError, r"labels: got shape \(1,\), expected \(2,\)"),
        ((LOGITS, LABELS.to("meta")), {}, ValueError, "labels: is on meta, expected c"),
        ((LOGITS, LABELS), {"mask": LABELS}, TypeError, r"mask: got torch.int64.*\.bool\(\)"),
        ((LOGITS, LABELS), {"mask": LOGITS == 0}, ValueError, "mask: got shape"),
        ((LOGITS, LABELS), {"temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ((LOGITS, LABELS), {"temperature": math.nan}, ValueError, "temperature: got nan"),
    ],
)
def test_errors_name_the_argument(impl, arguments, options, error, message):
    with pytest.raises(error, match=message):
        logprobs_from_logits(*arguments, **options, impl=impl)


@pytest.mark.parametrize("label", [5, -100])
def test_labels_out_of_range(impl, label):
    labels = torch.tensor([0, label])
    if labels.is_cuda:  # checking the labels would wait for the device
        out = logprobs_from_logits(LOGITS, labels, impl=impl)
        assert out.logprobs.isnan().tolist() == [False, True]
        return
    with pytest.raises(ValueError, match=rf"labels: got {label} at \(1,\), expected 0 to 4"):
        logprobs_from_logits(LOGITS, labels, impl=impl)


def test_label_out_of_range_is_found_beside_masked_ones(impl):
    labels, mask = torch.tensor([[-100, 4], [9, 9]]), torch.tensor([[False, True], [False, True]])
    if labels.is_cuda:
        pytest.skip("to look at labels on a GPU would wait for it")
    with pytest.raises(ValueError, match=r"labels: got 9 at \(1, 1\)"):
        logprobs_from_logits(torch.zeros(2, 2, 5), labels, mask=mask, impl=impl)
