"""decode_attention against its definition in float64, and the independence of its rows."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logprob_truth import assert_within_budget
from runnable import FLOATS, TRITON, examples, generator, implementations
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ppo_fast.ops import decode_attention

pytestmark = pytest.mark.parametrize("impl", implementations("decode_attention"))

CHUNK = 32


@pytest.fixture(autouse=True, scope="module")
def short_chunks():
    """Make the Triton kernels' chunks short, so that a few dozen columns are several chunks.

    A chunk then has two blocks, and chunks are combined two at a time.
    """
    with pytest.MonkeyPatch.context() as patch:
        if TRITON:
            kernels = importlib.import_module("ppo_fast.ops.decode_attention.triton")
            patch.setattr(kernels, "CHUNK", CHUNK)
            patch.setattr(kernels, "COMBINE", kernels.COMBINE._replace(block=2))
            for place, how in kernels.ATTEND.items():
                patch.setitem(kernels.ATTEND, place, how._replace(block=16))
        yield


def draw(
    lengths: list[int],
    columns: int,
    heads: int = 3,
    kv_heads: int = 1,
    head_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw query, keys, values and lengths; keys and values are part of a larger cache of NaN."""
    g, rows = generator(seed), len(lengths)
    query = torch.randn(rows, heads, head_size, generator=g).to(dtype)
    cache = torch.full((2, rows + 2, columns + 5, kv_heads, head_size), math.nan, dtype=dtype)
    keys, values = cache[:, :rows, :columns]
    keys.copy_(torch.randn(keys.shape, generator=g))
    values.copy_(torch.randn(keys.shape, generator=g))
    return query, keys, values, torch.tensor(lengths)


def nan_outside(x: Tensor, lengths: Tensor, window: int | None) -> Tensor:
    """Fill the columns that each row does not attend to with NaN."""
    for row, end in zip(x, lengths.tolist(), strict=True):
        row[end:] = math.nan
        if window is not None:
            row[: max(end - window, 0)] = math.nan
    return x


def by_rows(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scaling: float, window: int | None
) -> Tensor:
    """Compute attention by its definition, for each row and head, on the columns the row sees."""
    rows = []
    for q, k, v, end in zip(query, keys, values, lengths.tolist(), strict=True):
        seen = slice(0 if window is None else max(end - window, 0), end)
        group = len(q) // k.shape[1]
        heads = [
            ((k[seen, h // group] @ q[h]) * scaling).softmax(0) @ v[seen, h // group]
            for h in range(len(q))
        ]
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def rounded_shares(values: Tensor) -> Tensor | float:
    """Return the error of results where tensor cores take probabilities in half precision.

    It is half an ulp of each probability, times the largest value. Triton's interpreter multiplies
    float32.
    """
    if not TRITON or values.dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    return torch.finfo(values.dtype).eps / 2 * values.nan_to_num().abs().amax().double()


# Heads of the query, of keys; their size. Padded to 16 rows, and to a power of two.
HEADS = [(1, 1, 64), (3, 3, 80), (6, 2, 64), (4, 1, 128), (14, 2, 20), (17, 1, 16)]


@settings(max_examples=examples(40))
@given(
    heads=st.sampled_from(HEADS),
    columns=st.sampled_from([1, 31, 33, 77]),
    fractions=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 33, 1000]),
    scaling=st.sampled_from([None, 1.0, -0.3]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
)
def test_against_float64(impl, heads, columns, fractions, window, scaling, dtype, seed):
    """Rows have different lengths, in a strided cache that is NaN where no row attends."""
    lengths = [1 + round(f * (columns - 1)) for f in fractions]
    query, keys, values, lengths = draw(lengths, columns, *heads, dtype=dtype, seed=seed)
    keys, values = (nan_outside(x, lengths, window) for x in (keys, values))
    scaling = heads[2] ** -0.5 if scaling is None else scaling
    got = decode_attention(query, keys, values, lengths, scaling=scaling, window=window, impl=impl)
    assert got.dtype == dtype
    assert got.is_contiguous()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    eager, truth = (
        by_rows(*(x.to(d) for x in (query, keys, values)), lengths, scaling, window)
        for d in (wide, torch.float64)
    )
    assert_within_budget(got, eager, truth, rounded_shares(values))


def test_large_scores(impl):
    """exp overflows on these scores; the largest is in the last chunk."""
    query, keys, values, lengths = draw([77, 40], 77, head_size=64)
    query, keys = 20 * query, 20 * keys
    keys[:, : 2 * CHUNK] *= 0.1
    got = decode_attention(query, keys, values, lengths, scaling=1.0, impl=impl)
    truth = by_rows(*(x.double() for x in (query, keys, values)), lengths, 1.0, None)
    eager = by_rows(query, keys, values, lengths, 1.0, None)
    assert_within_budget(got, eager, truth)


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_a_rows_bits_depend_on_the_row_alone(impl, dtype):
    """The bits do not depend on other rows, or on the columns and strides of the cache."""
    if impl == "reference":
        pytest.skip("products of the BLAS")
    query, keys, values, lengths = draw([70, 33, 5], 77, 3, 1, 20, dtype)
    for window in (None, 40):
        together = decode_attention(
            query, keys, values, lengths, scaling=0.2, window=window, impl=impl
        )
        for i, end in enumerate(lengths.tolist()):
            row = slice(i, i + 1)
            for columns in (end, 77):
                k, v = (x[row, :columns].contiguous() for x in (keys, values))
                alone = decode_attention(
                    query[row], k, v, lengths[row], scaling=0.2, window=window, impl=impl
                )
                assert torch.equal(alone, together[row])


def test_lengths_may_change_between_calls(impl):
    """Replays of a CUDA graph change the lengths, and not the launches."""
    query, keys, values, lengths = draw([3, 60], 77)
    for change in ([3, 60], [70, 1], [33, 64]):
        lengths.copy_(torch.tensor(change))
        got = decode_attention(query, keys, values, lengths, scaling=0.25, impl=impl)
        expected = by_rows(query, keys, values, lengths, 0.25, None)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("columns", [0, 20, 77])
def test_a_row_of_length_0_gives_zeros(impl, columns):
    query, keys, values, lengths = draw([0, columns], columns)
    keys[0], values[0] = math.nan, math.nan
    for window in (None, 7):
        got = decode_attention(query, keys, values, lengths, scaling=0.25, window=window, impl=impl)
        assert torch.equal(got[0], torch.zeros_like(got[0]))
        assert (got[1] != 0).all() == (columns > 0)


def test_nan_within_the_length_gives_nan(impl):
    query, keys, values, lengths = draw([77, 77], 77)
    keys[0, 50], values[1, 3] = math.nan, math.nan
    got = decode_attention(query, keys, values, lengths, scaling=0.25, impl=impl)
    assert got.isnan().all()


@pytest.mark.parametrize("layout", ["sliced query", "strided query", "heads first", "one for all"])
def test_layouts(impl, layout):
    query, keys, values, lengths = draw([40, 77], 77, 6, 2)
    if layout == "sliced query":  # from a product that computes keys and values too
        given = torch.cat([query, query], 1)[:, 6:], keys, values
    if layout == "strided query":
        given = query.transpose(1, 2).contiguous().transpose(1, 2), keys, values
    if layout == "heads first":
        query = query.contiguous()
        given = (query, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)))
    if layout == "one for all":
        keys, values = (x[:1].expand_as(x) for x in (keys, values))
        given = query, keys, values
    got = decode_attention(*given, lengths, scaling=0.25, impl=impl)
    torch.testing.assert_close(got, by_rows(query, keys, values, lengths, 0.25, None))


def test_no_rows(impl):
    query, keys, values, lengths = (x[:0] for x in draw([1], 40))
    got = decode_attention(query, keys, values, lengths, scaling=0.25, impl=impl)
    assert got.shape == (0, 3, 16)


def test_auto(impl):
    """auto: the Triton kernel on a GPU; the reference on a CPU and for larger heads."""
    query, keys, values, lengths = draw([3], 9, head_size=257)
    got = decode_attention(query, keys, values, lengths, scaling=0.1)
    torch.testing.assert_close(got, by_rows(query, keys, values, lengths, 0.1, None))
    if impl == "triton":
        with pytest.raises(NotImplementedError, match="heads of 257, expected 256 at most"):
            decode_attention(query, keys, values, lengths, scaling=0.1, impl=impl)


def test_runs_on_meta_and_fake_tensors(impl):
    query, keys, values, lengths = draw([3, 4], 9)
    if impl == "reference":
        on_meta = [x.to("meta") for x in (query, keys, values, lengths)]
        got = decode_attention(*on_meta, scaling=0.25, window=3, impl=impl)
        assert (got.shape, got.device.type) == (query.shape, "meta")
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (query, keys, values, lengths)]
        assert decode_attention(*fake, scaling=0.25, window=3, impl=impl).shape == query.shape


def test_compiles_as_one_graph(impl):
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    given = draw([3, 40], 50)
    for window in (None, 7):
        got = compiled(*given, scaling=0.25, window=window, impl=impl)
        torch.testing.assert_close(got, by_rows(*given, 0.25, window))


def test_raw_op(impl):
    if impl == "triton":
        op = torch.ops.ppo_fast.decode_attention_triton.default
        for window in (None, 7):
            torch.library.opcheck(op, (*draw([3, 40], 50), 0.25, window))


def test_an_input_that_requires_grad_is_refused_where_autograd_is_on(impl):
    given = draw([3, 9], 9)
    given[2].requires_grad_()
    with pytest.raises(ValueError, match=r"no gradient.*torch\.no_grad\(\)"):
        decode_attention(*given, scaling=0.25, impl=impl)
    with torch.no_grad():
        assert not decode_attention(*given, scaling=0.25, impl=impl).requires_grad


Q, KV, LENGTHS = torch.zeros(2, 6, 4), torch.zeros(2, 5, 3, 4), torch.tensor([1, 5])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query": Q.long()}, TypeError, "query: got torch.int64"),
        ({"query": Q[0]}, ValueError, r"query: got shape \(6, 4\), expected \[n, H, d\]"),
        ({"query": Q[:, :0]}, ValueError, r"query: got shape \(2, 0, 4\)"),
        (
            {"query": Q[:, :4]},
            ValueError,
            "keys: got 3 heads, expected a number that divides the 4",
        ),
        ({"keys": KV[:1]}, ValueError, r"keys: got shape .*expected \[2, L, K, 4\].*slice"),
        ({"keys": KV[..., :3]}, ValueError, r"keys: got shape \(2, 5, 3, 3\), expected"),
        ({"keys": KV[:, :, :0]}, ValueError, "keys: got 0 heads"),
        ({"keys": KV.half()}, TypeError, "keys: got torch.float16, expected torch.float32"),
        ({"keys": KV.to("meta")}, ValueError, "keys: is on meta, expected"),
        ({"values": KV[:, :4]}, ValueError, r"values: got shape \(2, 4, 3, 4\), expected"),
        ({"values": KV.double()}, TypeError, "values: got torch.float64, expected"),
        ({"values": KV.mT.contiguous().mT}, ValueError, r"values: got strides .*contiguous"),
        ({"lengths": LENGTHS.int()}, TypeError, r"lengths: got torch.int32.*\.long\(\)"),
        ({"lengths": LENGTHS[:1]}, ValueError, r"lengths: got shape \(1,\), expected \(2,\)"),
        ({"lengths": LENGTHS + 1}, ValueError, "lengths: got 6 in row 1, expected 0 to 5"),
        ({"lengths": LENGTHS - 2}, ValueError, "lengths: got -1 in row 0, expected 0 to 5"),
        ({"scaling": math.nan}, ValueError, "scaling is nan, expected a finite number"),
        ({"scaling": "1"}, TypeError, "scaling is str, expected a finite number"),
        ({"window": 0}, ValueError, "window: got 0, expected 1 or more, or None"),
    ],
)
def test_errors_name_the_argument(impl, changed, error, message):
    if "in row" in message and torch.get_default_device().type != "cpu":
        pytest.skip("a GPU's lengths are not looked at")
    given = {"query": Q, "keys": KV, "values": KV, "lengths": LENGTHS, "scaling": 0.5}
    with pytest.raises(error, match=message):
        decode_attention(**given | changed, impl=impl)
