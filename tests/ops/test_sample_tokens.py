from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logprob_truth import distribution
from runnable import FLOATS, examples, generator, implementations
from sample_truth import INTERPRETED, draws, many_draws, python_kept, python_noise, rows
from torch._subclasses.fake_tensor import FakeTensorMode

from ppo_fast.ops.sample_tokens import Sampled, reference, sample_tokens

IMPLS = pytest.mark.parametrize("impl", implementations("sample_tokens"))


@IMPLS
@settings(max_examples=examples(60))
@given(
    b=st.sampled_from([0, 1, 2, 5]),
    v=st.sampled_from([1, 2, 3, 5, 41, 423]),
    t=st.sampled_from([1.0, 0.5, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 10, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(["contiguous", "sliced", "transposed"]),
    holes=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 100),
    position=st.integers(0, 2**40),
)
def test_against_the_definition(impl, b, v, t, top_k, top_p, dtype, layout, holes, seed, position):
    logits = (torch.randn(b, v, generator=generator(seed % 1000)) * 3).to(dtype)
    if holes:
        logits[:, 1::2] = -math.inf
    if layout == "sliced":
        logits = torch.cat([logits, logits * math.nan, logits], 1)[:, :v]
    if layout == "transposed":
        logits = logits.t().contiguous().t()
    seeds, positions = torch.arange(b) + seed, torch.arange(b) * 3 + position
    out = sample_tokens(
        logits, seeds, positions, temperature=t, top_k=top_k, top_p=top_p, impl=impl
    )
    assert isinstance(out, Sampled)
    assert out.tokens.dtype == torch.int64
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.logprobs.dtype == out.sampling_logprobs.dtype == work
    for row in range(b):
        scaled = logits[row].double() / t
        kept = python_kept(scaled.tolist(), top_k, top_p)
        noisy = {
            j: scaled[j].item() + python_noise(seed + row, position + 3 * row, j) for j in kept
        }
        token = int(out.tokens[row])
        assert token in kept
        assert noisy[token] >= max(noisy.values()) - 1e-5
        _, log_p = distribution(scaled)
        assert out.logprobs[row].item() == pytest.approx(log_p[token].item(), abs=1e-5)
        _, log_q = distribution(scaled[kept])
        expected = log_q[kept.index(token)].item()
        assert out.sampling_logprobs[row].item() == pytest.approx(expected, abs=1e-5)


# Words found by search, at position 0, with the noise that the docstring's formula gives them.
RARE_WORDS = [
    (1343428, 3, 32 * math.log(2)),  # 0, which counts as 1: the largest noise
    (434540, 3396, 32 * math.log(2)),  # 1
    (6020, 2075, -math.log(24 * math.log(2))),  # 0xfffffea3 rounds up to 1 - 2^-24
    (207, 39758, -math.log(24 * math.log(2))),  # 0xffffffa2 rounds to 1: the smallest noise
]


@IMPLS
@pytest.mark.parametrize(("seed", "token", "noise"), RARE_WORDS)
def test_draws_with_rare_words(impl, seed, token, noise):
    """The other token is drawn if its noisy logit is slightly larger, not if slightly smaller."""
    assert python_noise(seed, 0, token) == pytest.approx(noise, rel=1e-6)
    other = 0 if token > 3 else 1
    logits = torch.full((2, token + 1), -math.inf)
    logits[:, token] = 0.0
    logits[:, other] = noise - python_noise(seed, 0, other) + torch.tensor([2e-5, -2e-5])
    seeds = torch.full((2,), seed)
    out = sample_tokens(logits, seeds, torch.zeros_like(seeds), impl=impl)
    assert out.tokens.tolist() == [other, token]


@IMPLS
def test_draws_count_the_low_32_bits_of_the_position_and_all_of_the_seed(impl):
    n = draws(200)
    logits, (seeds, positions) = torch.zeros(n, 41), rows(n)
    tokens = sample_tokens(logits, seeds, positions, impl=impl).tokens
    for far in (2**32, -(2**32), 2**62):
        assert torch.equal(sample_tokens(logits, seeds, positions + far, impl=impl).tokens, tokens)
    for other in (seeds + 2**32, seeds - 2**63):
        assert not torch.equal(sample_tokens(logits, other, positions, impl=impl).tokens, tokens)


@IMPLS
def test_the_smaller_id_is_drawn_on_a_tie(impl):
    """At 1e9 float32 numbers are 64 apart: the noise is lost, and all are equal. At 1e8 they are 8
    apart: noise above 4 raises the first token to the logit of the last, which is larger."""
    n = draws(50)
    flat = torch.full((n, 300), 1e9)
    flat[:, :5] = -math.inf
    assert (sample_tokens(flat, *rows(n), impl=impl).tokens == 5).all()
    steps = torch.full((500, 300), -math.inf)
    steps[:, 0], steps[:, 1], steps[:, 299] = 1e8, 1e8 - 8, 1e8 + 8
    values = steps + reference.gumbel_noise(*rows(500), 300)
    tied = values[:, 0] == values[:, 299]
    assert tied.any()
    drawn = tied | (torch.arange(500) < draws(500))
    seeds, positions = rows(500)
    tokens = sample_tokens(steps[drawn], seeds[drawn], positions[drawn], impl=impl).tokens
    assert (tokens[tied[drawn]] == 0).all()
    assert torch.equal(tokens, values.argmax(-1)[drawn])


# Quantiles 1 - 1e-4 of the chi-square distribution, by degrees of freedom.
CHI_SQUARE_LIMIT = {2: 18.42, 6: 27.86}


@IMPLS
@many_draws
@pytest.mark.parametrize("counted", ["seeds", "positions", "high bits of seeds"])
@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(0, 1.0, 7), (3, 1.0, 3), (0, 0.7, 3)])
def test_draws_follow_the_distribution(impl, counted, top_k, top_p, kept):
    n = 20000
    logits = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.9, -2.0, 0.1])
    steps, still = torch.arange(n), torch.full((n,), 11)
    seeds, positions = (still, steps) if counted == "positions" else (steps, still)
    seeds = seeds << 32 if counted == "high bits of seeds" else seeds
    out = sample_tokens(
        logits.expand(n, 7), seeds, positions, temperature=1.2, top_k=top_k, top_p=top_p, impl=impl
    )
    p = torch.softmax(logits.double() / 1.2, -1)
    p[p.argsort()[: 7 - kept]] = 0
    p /= p.sum()
    counts = torch.bincount(out.tokens, minlength=7).double()
    assert (counts[p == 0] == 0).all()
    expected = n * p[p > 0]
    statistic = ((counts[p > 0] - expected) ** 2 / expected).sum().item()
    assert statistic < CHI_SQUARE_LIMIT[kept - 1]


@IMPLS
@many_draws
def test_consecutive_draws_are_independent(impl):
    n = 20000
    seeds, positions = torch.full((n,), 3), torch.arange(n)
    tokens = sample_tokens(torch.zeros(n, 3), seeds, positions, impl=impl).tokens
    pairs = torch.bincount(tokens[:-1] * 3 + tokens[1:], minlength=9).double()
    expected = (n - 1) / 9
    assert ((pairs - expected) ** 2 / expected).sum().item() < 31.83  # 8 degrees, 1e-4


@IMPLS
@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.8}])
@pytest.mark.parametrize("v", [41, 423])
def test_a_row_does_not_depend_on_the_others(impl, options, v):
    b = 3 if INTERPRETED else 9
    logits, (seeds, positions) = torch.randn(b, v) * 3, rows(b)
    together = sample_tokens(logits, seeds, positions, impl=impl, **options)
    order = torch.randperm(b)
    shuffled = sample_tokens(logits[order], seeds[order], positions[order], impl=impl, **options)
    for in_order, out_of_order in zip(together, shuffled, strict=True):
        assert torch.equal(in_order[order], out_of_order)
    for i in range(b):
        alone = sample_tokens(
            logits[i : i + 1], seeds[i : i + 1], positions[i : i + 1], impl=impl, **options
        )
        assert all(torch.equal(x[i : i + 1], y) for x, y in zip(together, alone, strict=True))


@IMPLS
def test_more_rows_than_one_block(impl):
    """With this vocabulary size the reference draws for a few rows at a time."""
    b = 2 if INTERPRETED else 11
    logits, (seeds, positions) = torch.randn(b, 50257), rows(b)
    together = sample_tokens(logits, seeds, positions, impl=impl)
    last = sample_tokens(logits[-1:], seeds[-1:], positions[-1:], impl=impl)
    assert together.tokens.shape == (b,)
    assert together.tokens.unique().numel() > 1
    assert torch.equal(together.tokens[-1:], last.tokens)
    assert torch.equal(together.logprobs[-1:], last.logprobs)


@IMPLS
@pytest.mark.parametrize("options", [{"top_k": 8}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.7}])
def test_truncation_does_not_change_a_draw_that_it_keeps(impl, options):
    n = 10 if INTERPRETED else 200
    logits, (seeds, positions) = torch.randn(n, 41), rows(n)
    free = sample_tokens(logits, seeds, positions, impl=impl)
    cut = sample_tokens(logits, seeds, positions, impl=impl, **options)
    top_k, top_p = options.get("top_k", 0), options.get("top_p", 1.0)
    kept = [python_kept(row, top_k, top_p) for row in logits.double().tolist()]
    survived = torch.tensor([int(t) in k for t, k in zip(free.tokens, kept, strict=True)])
    assert survived.any()
    assert not survived.all()
    assert torch.equal(free.tokens[survived], cut.tokens[survived])
    assert torch.equal(free.logprobs[survived], cut.logprobs[survived])
    assert (cut.sampling_logprobs > cut.logprobs).all()
    assert torch.equal(free.sampling_logprobs, free.logprobs)


@IMPLS
@pytest.mark.parametrize(
    ("logits", "options", "kept"),
    [
        ([1.0, 2.0, 2.0, 2.0, 0.0], {"top_k": 2}, {1, 2}),
        ([1.0, 2.0, 2.0, 2.0, 0.0], {"top_k": 1}, {1}),
        ([1.0, 1.0, 1.0, 1.0], {"top_p": 0.5}, {0, 1}),
        ([1.0, 1.0, 1.0, 1.0], {"top_p": 0.51}, {0, 1, 2}),
        ([0.0, 3.0, 0.0, 1.0], {"top_p": 1e-9}, {1}),
        # Two thirds of the two that top_k keeps, though under one half of them all.
        ([1.0, 1.0, 1.0, 1.0], {"top_k": 2, "top_p": 0.4}, {0}),
        ([-math.inf, 0.0, -math.inf, 0.0], {"top_k": 3}, {1, 3}),
    ],
)
def test_truncation_keeps_the_smallest_set(impl, logits, options, kept):
    n = draws(300)
    out = sample_tokens(torch.tensor(logits).expand(n, -1), *rows(n), impl=impl, **options)
    drawn = set(out.tokens.tolist())
    assert drawn <= kept
    assert drawn == kept or INTERPRETED  # the interpreter draws too few tokens to meet every one
    if len(set(torch.tensor(logits)[list(kept)].tolist())) == 1:
        expected = torch.full((n,), -math.log(len(kept)))
        torch.testing.assert_close(out.sampling_logprobs, expected, rtol=0, atol=1e-6)


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [-3.0, 0.0, 3.0])
def test_ties_at_the_truncation_boundary_keep_the_smaller_ids(impl, dtype, tied):
    """Negative floats compared as integers have the reverse order."""
    logits = torch.tensor([[tied - 1.5] * 3 + [tied] * 5 + [tied + 1.0]], dtype=dtype)
    for kept, options in ((3, {"top_k": 3}), (2, {"top_p": 0.4})):
        out = sample_tokens(logits, *rows(1), impl=impl, **options)
        mass = math.exp(1.0) + kept - 1
        drawn = 1.0 if out.tokens.item() == 8 else 0.0
        assert out.tokens.item() in (8, *range(3, 2 + kept))
        assert out.sampling_logprobs.item() == pytest.approx(drawn - math.log(mass), abs=1e-5)


@IMPLS
def test_impossible_tokens_are_never_drawn(impl):
    n = 20 if INTERPRETED else 500
    logits = torch.full((n, 41), -math.inf)
    logits[:, 17], logits[:, 30] = -1000.0, -1001.0
    out = sample_tokens(logits, *rows(n), impl=impl)
    assert set(out.tokens.tolist()) == {17, 30}


@IMPLS
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}])
@pytest.mark.parametrize(
    ("fill", "where", "message"),
    [
        (math.nan, (1, 3), "logits: row 1 holds NaN"),
        (math.inf, (2, 0), r"logits: row 2 holds \+inf"),
        (-math.inf, (1, slice(None)), "logits: row 1 holds nothing but -inf"),
        (3e38, (0, 4), r"logits: row 0 holds \+inf, before or after division"),
    ],
)
def test_a_row_without_finite_logits_is_named_in_the_error(impl, options, fill, where, message):
    logits = torch.zeros(3, 5)
    logits[where] = fill
    options = {"temperature": 0.5, **options}
    if logits.is_cuda:  # checking the logits would wait for the device
        out = sample_tokens(logits, *rows(3), impl=impl, **options)
        named = int(message.split()[2])
        assert out.logprobs.isnan().tolist() == [row == named for row in range(3)]
        return
    with pytest.raises(ValueError, match=message):
        sample_tokens(logits, *rows(3), impl=impl, **options)


@IMPLS
def test_results_carry_no_gradient(impl):
    out = sample_tokens(torch.randn(3, 41, requires_grad=True), *rows(3), impl=impl)
    assert not out.logprobs.requires_grad
    assert not out.sampling_logprobs.requires_grad


@pytest.mark.slow
@IMPLS
@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9, "temperature": 0.7}])
def test_compiles_as_one_graph(impl, options):
    compiled = torch.compile(sample_tokens, fullgraph=True, backend="aot_eager")
    logits, (seeds, positions) = torch.randn(3, 41), rows(3)
    got = compiled(logits, seeds, positions, impl=impl, **options)
    expected = sample_tokens(logits, seeds, positions, impl=impl, **options)
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.sampling_logprobs, expected.sampling_logprobs)


@IMPLS
@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9}])
def test_runs_on_meta_and_fake_tensors(impl, options):
    if impl == "reference":
        index = torch.zeros(3, dtype=torch.int64, device="meta")
        out = sample_tokens(torch.zeros(3, 41, device="meta"), index, index, impl=impl, **options)
        assert [x.shape for x in out] == [(3,)] * 3
    with FakeTensorMode():
        index = torch.zeros(3, dtype=torch.int64)
        assert sample_tokens(torch.zeros(3, 41), index, index, impl=impl).tokens.shape == (3,)


LOGITS, INDEX = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)


@IMPLS
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((LOGITS.long(), INDEX, INDEX), {}, TypeError, "logits: got torch.int64"),
        ((LOGITS[0], INDEX, INDEX), {}, ValueError, r"logits: got shape \(5,\), expected \[B, V\]"),
        ((LOGITS[:, :0], INDEX, INDEX), {}, ValueError, r"logits: got shape \(2, 0\)"),
        ((LOGITS, INDEX.int(), INDEX), {}, TypeError, "seeds: got torch.int32"),
        ((LOGITS, INDEX, INDEX[:1]), {}, ValueError, r"positions: got shape \(1,\)"),
        ((LOGITS, INDEX.to("meta"), INDEX), {}, ValueError, "seeds: is on meta"),
        ((LOGITS, INDEX, INDEX), {"temperature": 0.0}, ValueError, r"got 0.*argmax\(-1\)"),
        ((LOGITS, INDEX, INDEX), {"temperature": -1.0}, ValueError, "temperature: got -1.0"),
        ((LOGITS, INDEX, INDEX), {"top_k": -1}, ValueError, "top_k: got -1"),
        ((LOGITS, INDEX, INDEX), {"top_p": 0.0}, ValueError, "top_p: got 0.0"),
        ((LOGITS, INDEX, INDEX), {"top_p": 1.5}, ValueError, "top_p: got 1.5"),
    ],
)
def test_errors_name_the_argument(impl, arguments, options, error, message):
    with pytest.raises(error, match=message):
        sample_tokens(*arguments, **options, impl=impl)
