"""Noise that bounds may skip, and truncation without sorting: the kernels of sample_tokens, which
compute by blocks, against the reference."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from runnable import FLOATS, implementations
from sample_truth import INTERPRETED, KINDS, TRUNCATIONS, logits_of, many_draws, noisy, rows

from ppo_fast.ops import sample_tokens
from ppo_fast.ops.backends import library
from ppo_fast.ops.sample_tokens import reference

pytestmark = pytest.mark.parametrize(
    "impl", [impl for impl in implementations("sample_tokens") if impl.values != ("reference",)]
)

# In the interpreter every seventh: all values of each of the three are among them.
TRUNCATED = list(
    product(
        ["normal", "peaked", "flat", "steps", "holes"],
        TRUNCATIONS,
        [dtype for dtype in FLOATS if dtype != torch.float16],
    )
)[:: 7 if INTERPRETED else 1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1.0, 0.7])
def test_bounds_do_not_change_a_draw(impl, kind, t):
    b, v = 3 if INTERPRETED else 120, 5003
    logits = logits_of(kind, b, v)
    seeds, positions = torch.arange(b) * 7919, torch.arange(b)
    tokens = sample_tokens(logits, seeds, positions, temperature=t, impl=impl).tokens
    values = noisy(logits, seeds, positions, t)
    best, chosen = values.amax(-1), values.gather(-1, tokens[:, None])[:, 0]
    step = torch.finfo(values.dtype).eps * best.abs()
    assert (chosen >= best - 4e-6 - 2 * step).all()
    assert (tokens == values.argmax(-1)).float().mean() > 0.98


def test_noise_of_every_token(impl):
    """With logits -g, where g is the reference's noise, and a slightly larger logit for one token,
    this token is drawn if the kernel's noise is the same.

    The words with the largest and smallest noise test the conversion of a word to a float.
    """
    v, extreme, ordinary = 4100, 4 if INTERPRETED else 100, 8 if INTERPRETED else 300
    many = reference.gumbel_noise(torch.arange(64), torch.full((64,), 5), v).flatten()
    found = torch.cat([many.topk(extreme).indices, many.topk(extreme, largest=False).indices])
    seeds = torch.cat([found // v, torch.full((ordinary,), 1 << 40)])
    tokens = torch.cat([found % v, torch.arange(ordinary) * 13])
    positions = torch.full_like(seeds, 5)
    logits = -reference.gumbel_noise(seeds, positions, v)
    logits.scatter_add_(1, tokens[:, None], torch.full((len(seeds), 1), 2e-5))
    assert torch.equal(sample_tokens(logits, seeds, positions, impl=impl).tokens, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options", "dtype"), TRUNCATED)
def test_truncation_equals_the_references(impl, kind, options, dtype):
    b, v = 1 if INTERPRETED else 12, 5003
    logits, seeds, positions = logits_of(kind, b, v).to(dtype), torch.arange(b), torch.arange(b)
    options = {"temperature": 0.8, **options}
    got = sample_tokens(logits, seeds, positions, **options, impl=impl)
    expected = sample_tokens(logits, seeds, positions, **options, impl="reference")
    assert torch.equal(got.tokens, expected.tokens)
    for x, y in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "first", "count"),
    [({"top_k": 700}, 3700, 700), ({"top_k": 3}, 4094, 3), ({"top_p": 0.00242}, 4094, 3)],
)
def test_of_equal_logits_the_smaller_ids_are_kept(impl, options, first, count):
    """Equal logits begin in one block and end in another."""
    b, v = 4 if INTERPRETED else 50, 5003
    logits = torch.full((b, v), -1.0)
    logits[:, first:] = 2.5
    seeds, positions = rows(b)
    out = sample_tokens(logits, seeds, positions, **options, impl=impl)
    kept = noisy(logits, seeds, positions, 1.0)[:, first : first + count]
    assert torch.equal(out.tokens, first + kept.argmax(-1))
    exact = torch.full((b,), -math.log(count))
    torch.testing.assert_close(out.sampling_logprobs, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"top_k": 30, "top_p": 0.6}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_of_rows_does_not_matter(impl, options, dtype):
    """Test rows that start at multiples of 16 bytes (v a multiple of 8), and rows that do not."""
    b, v = 1 if INTERPRETED else 2, 2504
    logits, (seeds, positions) = logits_of("normal", b, v).to(dtype), rows(b)
    expected = sample_tokens(logits, seeds, positions, **options, impl=impl)
    wide = torch.full((b, v + 3), math.nan, dtype=dtype)
    wide[:, 1 : v + 1] = logits
    padded = torch.full((b, v + 8), math.nan, dtype=dtype)
    padded[:, :v] = logits
    for layout in (wide[:, 1 : v + 1], padded[:, :v], logits.t().contiguous().t()):
        got = sample_tokens(layout, seeds, positions, **options, impl=impl)
        assert torch.equal(got.tokens, expected.tokens)
        for x, y in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@many_draws
def test_draws_over_many_blocks_follow_the_distribution(impl):
    n, v = 20000, 1000
    logits = torch.randn(v) * 2
    seeds, positions = torch.arange(n), torch.full((n,), 2)
    tokens = sample_tokens(logits.expand(n, v), seeds, positions, impl=impl).tokens
    group = torch.arange(v) * 8 // v
    p = torch.zeros(8).double().index_add(0, group, logits.double().softmax(-1))
    counts = torch.bincount(group[tokens], minlength=8)
    statistic = ((counts - n * p) ** 2 / (n * p)).sum().item()
    assert statistic < 29.88  # 7 degrees of freedom, 1 - 1e-4


@pytest.mark.parametrize("options", TRUNCATIONS[:: 8 if INTERPRETED else 1])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_nan_and_leaves_the_others_alone(impl, options, poison):
    logits, index = logits_of("normal", 3, 5003), torch.arange(3)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    run = library.sample_tokens[impl]
    expected = run(logits, index, index, *options.values())
    logits[1, slice(None) if poison == -math.inf else 4400] = poison
    tokens, *logprobs = run(logits, index, index, *options.values())
    assert 0 <= tokens[1] < 5003
    assert all(x[1].isnan() for x in logprobs)
    for got, before in zip((tokens, *logprobs), expected, strict=True):
        assert torch.equal(got[::2], before[::2])
