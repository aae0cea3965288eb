"""What only the C++ kernel of sample_tokens does: skip noise by bounds, keep bits, read rows."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from ppo_fast.ops import logprobs_from_logits, sample_tokens
from ppo_fast.ops.dispatch import missing
from ppo_fast.ops.sample_tokens import reference

pytestmark = pytest.mark.skipif(bool(missing("cpp")), reason=str(missing("cpp")))

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TRUNCATIONS = [
    {},
    {"top_k": 1},
    {"top_k": 30},  # fewer than there are blocks of 128 tokens
    {"top_k": 700},  # more
    {"top_k": 5002},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"top_k": 30, "top_p": 0.6},
    {"top_k": 700, "top_p": 0.95},
]


def instruction_sets() -> list[str]:
    if missing("cpp"):
        return []
    from ppo_fast import _C

    return _C.instruction_sets()


@pytest.fixture(params=instruction_sets())
def instruction_set(request):
    from ppo_fast import _C

    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def logits_of(kind: str, b: int, v: int) -> Tensor:
    """Rows on which bounds rule out nothing, something, or nearly everything."""
    x = torch.randn(b, v)
    if kind == "flat":
        return torch.zeros(b, v)
    if kind == "peaked":
        return x.scatter(1, torch.randint(v, (b, 9)), 20 + torch.randn(b, 9))
    if kind == "peak in reach":  # as likely to be drawn as all the others together
        return (x / 10).scatter(1, torch.randint(v, (b, 1)), math.log(v))
    if kind == "rising":
        return (x * 3).sort(-1).values
    if kind == "falling":
        return (x * 3).sort(-1, descending=True).values
    if kind == "far from 0":
        return x * 3 - 10000
    if kind == "steps":  # ties, at the boundary of a truncation too
        return (x * 2).round()
    if kind == "holes":
        return (x * 3).masked_fill(torch.rand(b, v) < 0.9, -math.inf)
    return x * 3


KINDS = ["normal", "flat", "peaked", "peak in reach", "rising", "falling", "far from 0"]


def noisy(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float) -> Tensor:
    """x / t + g of every token, without any bound."""
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    noise = reference.gumbel_noise(seeds, positions, logits.shape[1])
    return logits.to(work) / temperature + noise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bounds_do_not_change_a_draw(instruction_set, kind, dtype):
    b, v = 120, 2051
    seeds, positions = torch.arange(b) * 7919, torch.arange(b)
    for t in (1.0, 0.7):
        logits = logits_of(kind, b, v).to(dtype)
        tokens = sample_tokens(logits, seeds, positions, temperature=t, impl="cpp").tokens
        values = noisy(logits, seeds, positions, t)
        best, chosen = values.amax(-1), values.gather(-1, tokens[:, None])[:, 0]
        step = torch.finfo(values.dtype).eps * best.abs()
        assert (chosen >= best - 4e-6 - step).all()
        assert (tokens == values.argmax(-1)).float().mean() > 0.98


def test_noise_of_every_token(instruction_set):
    """With logits -g, and a little more for one token: it is drawn where its noise is the
    reference's. Tokens of extreme words stand for the conversion of a word to a float."""
    v, extreme = 4100, 100
    many = reference.gumbel_noise(torch.arange(64), torch.full((64,), 5), v).flatten()
    found = torch.cat([many.topk(extreme).indices, many.topk(extreme, largest=False).indices])
    seeds = torch.cat([found // v, torch.full((300,), 1 << 40)])
    tokens = torch.cat([found % v, torch.arange(300)])
    positions = torch.full_like(seeds, 5)
    logits = -reference.gumbel_noise(seeds, positions, v)
    logits.scatter_add_(1, tokens[:, None], torch.full((len(seeds), 1), 2e-5))
    assert torch.equal(sample_tokens(logits, seeds, positions, impl="cpp").tokens, tokens)


@pytest.mark.parametrize("options", TRUNCATIONS)
@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "steps", "holes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_truncation_is_the_references(options, kind, dtype):
    b, v = 12, 5003
    logits, seeds, positions = logits_of(kind, b, v).to(dtype), torch.arange(b), torch.arange(b)
    options = {"temperature": 0.8, **options}
    got = sample_tokens(logits, seeds, positions, **options, impl="cpp")
    expected = sample_tokens(logits, seeds, positions, **options, impl="reference")
    assert torch.equal(got.tokens, expected.tokens)
    for x, y in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", TRUNCATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_has_the_same_bits_wherever_it_stands(options, dtype):
    b, v = 7, 5003
    logits = logits_of("normal", b, v).to(dtype)
    seeds, positions = torch.arange(b), torch.arange(b) + 3
    with threads(1):
        expected = sample_tokens(logits, seeds, positions, **options, impl="cpp")
        alone = [
            sample_tokens(logits[i : i + 1], seeds[i : i + 1], positions[i : i + 1], **options)
            for i in range(b)
        ]
    for i, row in enumerate(alone):
        assert all(torch.equal(x, y[i : i + 1]) for x, y in zip(row, expected, strict=True))
    wide = torch.full((b, 2 * v + 3), math.nan, dtype=dtype)
    wide[:, 1 : v + 1] = logits
    strided = torch.full((b, 2 * v), math.nan, dtype=dtype)
    strided[:, ::2] = logits
    layouts = [logits, wide[:, 1 : v + 1], strided[:, ::2], logits.t().contiguous().t()]
    for count in (1, 2, 5):
        for layout in layouts:
            with threads(count):
                got = sample_tokens(layout, seeds, positions, **options, impl="cpp")
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("t", [1.0, 0.7])
def test_logprobs_have_the_bits_of_the_log_prob_op(dtype, t):
    """So that a ratio of the two is exactly 1."""
    logits, index = logits_of("normal", 9, 3001).to(dtype), torch.arange(9)
    out = sample_tokens(logits, index, index, temperature=t, impl="cpp")
    again = logprobs_from_logits(logits, out.tokens, temperature=t, entropy=False, impl="cpp")
    assert torch.equal(out.logprobs, again.logprobs)
    assert torch.equal(out.sampling_logprobs, out.logprobs)


def test_draws_over_many_blocks_follow_the_distribution():
    n, v = 20000, 1000
    logits = torch.randn(v) * 2
    seeds, positions = torch.arange(n), torch.full((n,), 2)
    tokens = sample_tokens(logits.expand(n, v), seeds, positions, impl="cpp").tokens
    group = torch.arange(v) * 8 // v
    p = torch.zeros(8).double().index_add(0, group, logits.double().softmax(-1))
    counts = torch.bincount(group[tokens], minlength=8)
    statistic = ((counts - n * p) ** 2 / (n * p)).sum().item()
    assert statistic < 29.88  # 7 degrees of freedom, 1 - 1e-4


@pytest.mark.parametrize("options", TRUNCATIONS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_nan_and_leaves_the_others_alone(options, poison):
    logits, index = logits_of("normal", 3, 5003), torch.arange(3)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    expected = torch.ops.ppo_fast.sample_tokens_cpp.default(logits, index, index, *options.values())
    logits[1, slice(None) if poison == -math.inf else 4000] = poison
    tokens, *logprobs = torch.ops.ppo_fast.sample_tokens_cpp.default(
        logits, index, index, *options.values()
    )
    assert 0 <= tokens[1] < 5003
    assert all(x[1].isnan() for x in logprobs)
    for got, before in zip((tokens, *logprobs), expected, strict=True):
        assert torch.equal(got[::2], before[::2])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [(1.0, 0, 1.0), (0.7, 5, 0.9)])
def test_raw_op(dtype, options):
    seeds, positions = torch.arange(3), torch.full((3,), 4)
    logits = torch.randn(3, 41).to(dtype)
    torch.library.opcheck(
        torch.ops.ppo_fast.sample_tokens_cpp.default, (logits, seeds, positions, *options)
    )


@pytest.mark.parametrize("wrong", ["int seeds", "two positions", "top_k", "top_p", "temperature"])
def test_the_raw_op_refuses_what_it_cannot_read(wrong):
    logits, index = torch.randn(3, 41), torch.arange(3)
    seeds = index.int() if wrong == "int seeds" else index
    positions = index[:2] if wrong == "two positions" else index
    numbers = [
        -1.0 if wrong == "temperature" else 1.0,
        -1 if wrong == "top_k" else 0,
        math.nan if wrong == "top_p" else 1.0,
    ]
    with pytest.raises(ValueError, match=r"seeds|positions|out of range"):
        torch.ops.ppo_fast.sample_tokens_cpp.default(logits, seeds, positions, *numbers)
