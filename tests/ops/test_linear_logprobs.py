from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from logprob_truth import (
    assert_within_budget,
    rounding,
    true_logit_grad,
    true_logprobs,
)
from runnable import FLOATS, TRITON, WIDE, examples, generator, implementations
from small_tiles import BUDGETS, TILED, small_tiles  # noqa: F401 - a fixture

from ppo_fast.ops.linear_logprobs import linear_logprobs

pytestmark = pytest.mark.parametrize("impl", implementations("linear_logprobs"))


def true_head(hidden, weight, bias, scale, cap):
    """Compute logits in float64, and d logits / d (W h + b), by the formulas."""
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    z = z * scale
    if cap is None:
        return z, torch.full_like(z, scale)
    x = cap * torch.tanh(z / cap)
    return x, scale * (1 - (x / cap) ** 2)


def truth(hidden, weight, labels, bias, mask, t, scale, cap, a, b):
    """Compute l, H and the gradients of hidden, weight and bias in float64, and the allowed error
    of these gradients where the gradient of the logits is stored in half precision."""
    rounds = TRITON or (hidden.dtype == torch.bfloat16 and TILED.multiplies_bfloat16())
    stored_in = hidden.dtype if rounds and hidden.dtype == weight.dtype else torch.float32
    hidden = torch.where(mask[:, None], hidden.detach().double(), 0.0)
    weight = weight.detach().double()
    x, slope = true_head(hidden, weight, bias, scale, cap)
    l, h = true_logprobs(x, labels, mask, t)  # noqa: E741
    dz = true_logit_grad(x, labels, mask, t, a, b) * slope
    moved = rounding(dz, stored_in)
    moves = moved @ weight.abs(), moved.T @ hidden.abs(), moved.sum(0)
    return (l, h, dz @ weight, dz.T @ hidden, dz.sum(0)), (0.0, 0.0, *moves)


def eager(hidden, weight, labels, bias, mask, t, scale, cap, a, b):
    """Compute outputs and gradients in plain PyTorch, on operands converted to float32."""
    double = torch.float64 in (hidden.dtype, weight.dtype)
    work = torch.float64 if double else torch.float32
    h = torch.where(mask[:, None], hidden.detach(), 0.0).to(work).requires_grad_()
    w = weight.detach().to(work).requires_grad_()
    c = torch.zeros(len(w), dtype=work) if bias is None else bias.detach().to(work)
    x = F.linear(h, w, c.requires_grad_()) * scale
    x = x if cap is None else torch.tanh(x / cap) * cap
    log_p = torch.log_softmax(x / t, -1)
    labels = labels.where(mask, torch.tensor(0))
    l = log_p.gather(-1, labels[:, None])[:, 0] * mask  # noqa: E741
    entropy = -(log_p.exp() * log_p).sum(-1) * mask
    grads = torch.autograd.grad((l * a + entropy * b).sum(), [h, w, c])
    return l, entropy, *grads


@settings(max_examples=examples(60))
@given(
    n=st.sampled_from([0, 1, 2, 7]),
    v=st.sampled_from([1, 2, 41, 423]),
    d=st.sampled_from([1, 8, 33]),
    masking=st.sampled_from(["not given", "none masked", "all masked", "some masked"]),
    with_bias=st.booleans(),
    t=st.sampled_from([1.0, 0.7]),
    scale=st.sampled_from([1.0, 0.25]),
    cap=st.sampled_from([None, 3.0]),
    dtypes=st.sampled_from(
        [*((dtype, dtype) for dtype in FLOATS), (torch.bfloat16, torch.float32)]
    ),
    layout=st.sampled_from(["contiguous", "strided hidden", "transposed weight"]),
    budget=st.sampled_from(BUDGETS),
    seed=st.integers(0, 1000),
)
def test_against_float64(
    impl, n, v, d, masking, with_bias, t, scale, cap, dtypes, layout, budget, seed
):
    g = generator(seed)
    hidden = torch.randn(n, d, generator=g).to(dtypes[0])
    weight = torch.randn(v, d, generator=g).to(dtypes[1])
    bias = torch.randn(v, generator=g).to(dtypes[1]) if with_bias else None
    labels = torch.randint(v, (n,), generator=g)
    mask = torch.ones(n, dtype=torch.bool)
    if masking == "all masked":
        mask[:] = False
    if masking == "some masked":
        mask = torch.rand(n, generator=g) < 0.5
    hidden[~mask] = math.nan
    labels[~mask] = -100
    if layout == "strided hidden":
        hidden = torch.stack([hidden, hidden * math.nan], 1)[:, 0]
    if layout == "transposed weight":
        weight = weight.t().contiguous().t()
    given = [hidden, weight] if bias is None else [hidden, weight, bias]
    given = [x.detach().requires_grad_() for x in given]
    out = linear_logprobs(
        given[0],
        given[1],
        labels,
        bias=given[2] if with_bias else None,
        mask=None if masking == "not given" else mask,
        temperature=t,
        logit_scale=scale,
        softcap=cap,
        logits_budget_bytes=budget,
        impl=impl,
    )
    work = torch.float64 if torch.float64 in dtypes else torch.float32
    assert out.logprobs.dtype == out.entropy.dtype == work
    a, b = torch.randn(2, n, generator=g).to(work)
    grads = torch.autograd.grad([out.logprobs, out.entropy], given, [a, b])
    settings_ = (labels, bias, mask, t, scale, cap, a, b)
    true_values, moves = truth(hidden, weight, *settings_)
    eager_values = eager(hidden, weight, *settings_)
    values = zip((*out, *grads), eager_values, true_values, moves, strict=False)
    for got, by_hand, true, moved in values:
        assert_within_budget(got, by_hand, true, moved)
    assert [g.dtype for g in grads] == [x.dtype for x in given]
    for zero in (out.logprobs, out.entropy, grads[0]):
        assert (zero[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vocabulary_of_gpt2(impl, dtype, monkeypatch):
    monkeypatch.setattr(TILED, "_TILE_BYTES", 4 * 3 * 20000)  # three tiles, over several blocks
    monkeypatch.setattr(TILED, "_MIN_COLUMNS", 1)
    hidden, weight = torch.randn(3, 8, generator=generator(0)).to(dtype), torch.randn(50257, 8)
    weight, labels = weight.to(dtype), torch.tensor([50256, 7, 20000])
    mask, bias = torch.tensor([True, False, True]), torch.randn(50257)
    given = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    out = linear_logprobs(
        *given[:2], labels, bias=given[2], mask=mask, softcap=9.0, temperature=0.7, impl=impl
    )
    a, b = torch.randn(2, 3)
    grads = torch.autograd.grad(list(out), given, [a, b])
    settings_ = (labels, bias, mask, 0.7, 1.0, 9.0, a, b)
    true_values, moves = truth(hidden, weight, *settings_)
    eager_values = eager(hidden, weight, *settings_)
    for values in zip((*out, *grads), eager_values, true_values, moves, strict=True):
        assert_within_budget(*values)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_gradient_of_one_operand_alone(impl, trained, budget):
    operands = {"hidden": torch.randn(5, 8), "weight": torch.randn(41, 8), "bias": torch.randn(41)}
    operands[trained].requires_grad_()
    labels = torch.randint(41, (5,))
    hidden, weight, bias = operands.values()
    out = linear_logprobs(hidden, weight, labels, bias=bias, logits_budget_bytes=budget, impl=impl)
    a, b = torch.randn(2, 5)
    (grad,) = torch.autograd.grad(list(out), operands[trained], [a, b])
    mask = torch.ones(5, dtype=torch.bool)
    (_, _, *true), _ = truth(hidden, weight, labels, bias.detach(), mask, 1.0, 1.0, None, a, b)
    expected = dict(zip(operands, true, strict=True))[trained]
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=2e-5)


def test_a_tied_head_sums_both_gradients(impl):
    embedding = torch.randn(41, 8, dtype=WIDE, requires_grad=True)
    ids, labels = torch.tensor([3, 3, 7]), torch.tensor([1, 0, 40])

    def loss(hidden_from, head):
        out = linear_logprobs(torch.tanh(F.embedding(ids, hidden_from)), head, labels, impl=impl)
        return (out.logprobs - 0.3 * out.entropy).sum()

    (tied,) = torch.autograd.grad(loss(embedding, embedding), embedding)
    two = [embedding.detach().clone().requires_grad_() for _ in range(2)]
    apart = torch.autograd.grad(loss(*two), two)
    torch.testing.assert_close(tied, apart[0] + apart[1])


def test_masked_hidden_states_reach_no_gradient(impl):
    hidden = torch.randn(4, 8)
    hidden[1], hidden[2] = math.nan, math.inf
    weight = torch.randn(41, 8)
    labels, mask = torch.tensor([3, -100, -100, 4]), torch.tensor([True, False, False, True])
    grads = []
    for keep in (slice(None), [0, 3]):
        h, w = hidden[keep].clone().requires_grad_(), weight.clone().requires_grad_()
        bias = torch.zeros(41, requires_grad=True)
        out = linear_logprobs(h, w, labels[keep], bias=bias, mask=mask[keep], impl=impl)
        # Nor does a NaN of the loss at a masked token.
        upstream = torch.where(mask[keep], torch.tensor([2.0, 1, 1, -3])[keep], math.nan)
        torch.autograd.backward([out.logprobs, out.entropy], [upstream, upstream])
        grads.append((w.grad, bias.grad, h.grad[mask[keep]]))
        assert (h.grad[~mask[keep]] == 0).all()
    for with_rows, without in zip(*grads, strict=True):
        torch.testing.assert_close(with_rows, without)


def test_padding_of_the_vocabulary_carries_no_mass(impl):
    hidden = torch.randn(5, 8, requires_grad=True)
    weight, labels = torch.randn(41, 8), torch.randint(41, (5,))
    padded = torch.cat([weight, torch.randn(7, 8)]).requires_grad_()
    bias = torch.zeros(48)
    bias[41:] = -math.inf
    out = linear_logprobs(hidden, padded, labels, bias=bias, impl=impl)
    plain = linear_logprobs(hidden, weight, labels, impl=impl)
    torch.testing.assert_close(out, plain)
    grads = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), [hidden, padded])
    assert (grads[1][41:] == 0).all()
    (expected,) = torch.autograd.grad(plain.logprobs.sum() + plain.entropy.sum(), hidden)
    torch.testing.assert_close(grads[0], expected)


@pytest.mark.parametrize("budget", BUDGETS)
def test_leading_tokens_without_mass(impl, budget, monkeypatch):
    if (
        TRITON
    ):  # fewer launches in the interpreter, whole tiles and blocks without mass all the same
        monkeypatch.setattr(TILED, "_TILE_BYTES", 4 * 5 * 700)
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3000, 8)
    bias = torch.zeros(3000)
    bias[:2500] = -math.inf  # the first blocks of a kernel hold nothing
    labels = torch.randint(2500, 3000, (5,))
    out = linear_logprobs(hidden, weight, labels, bias=bias, logits_budget_bytes=budget, impl=impl)
    plain = linear_logprobs(hidden, weight[2500:], labels - 2500, impl=impl)
    torch.testing.assert_close(out, plain)
    for outputs in (out, plain):
        (grad,) = torch.autograd.grad(list(outputs), hidden, [torch.ones(5), torch.ones(5)])
        assert grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_of_half_precision_operands_are_not_rounded(impl, autocast):
    hidden, weight = torch.randn(20, 64) * 4, torch.randn(41, 64)
    if not autocast:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    labels = torch.randint(41, (20,))
    x, _ = true_head(hidden, weight, None, 1.0, None)
    true, _ = true_logprobs(x, labels, torch.ones(20, dtype=torch.bool), 1.0)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=autocast):
        out = linear_logprobs(hidden, weight, labels, impl=impl)
    assert (out.logprobs.double() - true).abs().max() < 1e-4  # logits rounded to bf16: 0.2


def test_backward_twice_gives_the_same_gradient(impl):
    operands = [torch.randn(3, 8, requires_grad=True), torch.randn(41, 8, requires_grad=True)]
    out = linear_logprobs(*operands, torch.tensor([1, 2, 3]), impl=impl)
    loss = (out.logprobs * torch.tensor([1.0, -2.0, 0.5])).sum() + 0.3 * out.entropy.sum()
    first = torch.autograd.grad(loss, operands, retain_graph=True)
    second = torch.autograd.grad(loss, operands)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_entropy_only_when_asked_for(impl):
    hidden, weight, labels = torch.randn(2, 3, 8), torch.randn(41, 8), torch.randint(41, (2, 3))
    out = linear_logprobs(hidden, weight, labels, entropy=False, impl=impl)
    assert out.entropy is None
    both = linear_logprobs(hidden, weight, labels, impl=impl)
    assert both.entropy.shape == (2, 3)
    assert torch.equal(out.logprobs, both.logprobs)


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5, "softcap": 2.0}])
def test_gradcheck(impl, options):
    if impl != "reference":
        pytest.skip("finite differences are for the float64 reference")
    shapes = [(3, 4), (5, 4), (5,)]
    operands = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    labels, mask = torch.tensor([0, -100, 4]), torch.tensor([True, False, True])

    def outputs(h, w, b):
        return tuple(
            linear_logprobs(h, w, labels, bias=b, mask=mask, temperature=0.8, impl=impl, **options)
        )

    assert torch.autograd.gradcheck(outputs, operands)


def test_scale_and_cap_as_transformers_applies_them(impl):
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    size = {
        "vocab_size": 41,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    ids = torch.randint(41, (2, 7))
    for model, options in (
        (CohereForCausalLM(CohereConfig(**size, logit_scale=0.3)), {"logit_scale": 0.3}),
        (Gemma2ForCausalLM(Gemma2Config(**size, final_logit_softcapping=0.1)), {"softcap": 0.1}),
    ):
        with torch.no_grad():
            hidden = model.eval().model(ids).last_hidden_state
            expected = torch.log_softmax(model(ids).logits / 0.7, -1)
            expected = expected.gather(-1, ids[..., None])[..., 0]
            weight = model.get_output_embeddings().weight
            got = linear_logprobs(hidden, weight, ids, temperature=0.7, impl=impl, **options)
            plain = linear_logprobs(hidden, weight, ids, temperature=0.7, impl=impl)
        torch.testing.assert_close(got.logprobs, expected, rtol=0, atol=1e-5)
        assert (plain.logprobs - expected).abs().max() > 1e-3
