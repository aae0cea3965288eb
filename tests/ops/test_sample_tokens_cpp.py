"""Guarantees of the C++ kernel of sample_tokens: noise skipped by bounds, bits, layouts."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from sample_truth import KINDS, TRUNCATIONS, logits_of, noisy

from ppo_fast.ops import logprobs_from_logits, sample_tokens
from ppo_fast.ops.backends.impls import missing
from ppo_fast.ops.sample_tokens import reference

pytestmark = pytest.mark.skipif(bool(missing("cpp")), reason=str(missing("cpp")))

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def instruction_sets() -> list[str]:
    if missing("cpp"):
        return []
    from ppo_fast.ops import _C

    return _C.instruction_sets()


@pytest.fixture(params=instruction_sets())
def instruction_set(request):
    from ppo_fast.ops import _C

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_noise_of_every_token(instruction_set):
    """With logits -g, where g is the reference's noise, and a slightly larger logit for one token,
    this token is drawn if the kernel's noise is the same.

    The words with the largest and smallest noise test the conversion of a word to a float.
    """
    v, extreme = 4100, 100
    many = reference.gumbel_noise(torch.arange(64), torch.full((64,), 5), v).flatten()
    found = torch.cat([many.topk(extreme).indices, many.topk(extreme, largest=False).indices])
    seeds = torch.cat([found // v, torch.full((300,), 1 << 40)])
    tokens = torch.cat([found % v, torch.arange(300)])
    positions = torch.full_like(seeds, 5)
    logits = -reference.gumbel_noise(seeds, positions, v)
    logits.scatter_add_(1, tokens[:, None], torch.full((len(seeds), 1), 2e-5))
    assert torch.equal(sample_tokens(logits, seeds, positions, impl="cpp").tokens, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("options", TRUNCATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_has_the_same_bits_at_any_place_in_memory(options, dtype):
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
    """The ratio of the two is then exactly 1."""
    logits, index = logits_of("normal", 9, 3001).to(dtype), torch.arange(9)
    out = sample_tokens(logits, index, index, temperature=t, impl="cpp")
    again = logprobs_from_logits(logits, out.tokens, temperature=t, entropy=False, impl="cpp")
    assert torch.equal(out.logprobs, again.logprobs)
    assert torch.equal(out.sampling_logprobs, out.logprobs)


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
