"""Guarantees of the C++ kernels of the log-prob ops: bits, layouts, raw ops, drop_zero_rows."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from logprob_truth import assert_within_budget, true_logit_grad, true_logprobs

from ppo_fast.ops import linear_logprobs, logprobs_from_logits
from ppo_fast.ops.backends.impls import missing
from ppo_fast.ops.linear_logprobs import cpp as linear_cpp
from ppo_fast.ops.logprobs.cpp import _rows

pytestmark = pytest.mark.skipif(bool(missing("cpp")), reason=str(missing("cpp")))


def instruction_sets() -> list[str]:
    if missing("cpp"):
        return []
    from ppo_fast.ops import _C

    return _C.instruction_sets()


@contextmanager
def instruction_set(name: str):
    from ppo_fast.ops import _C

    before = _C.instruction_set()
    _C.use_instruction_set(name)
    try:
        yield
    finally:
        _C.use_instruction_set(before)


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(logits, labels, a, b, **options):
    """Return log-probs, entropies and gradient."""
    logits = logits.detach().requires_grad_()
    out = logprobs_from_logits(logits, labels, impl="cpp", **options)
    return (*out, torch.autograd.grad(list(out), logits, [a, b])[0])


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [41, 1023, 5003])  # within a chunk, and over several
def test_every_instruction_set_is_within_the_error_budget(name, dtype, v):
    logits, labels = (torch.randn(7, v) * 5).to(dtype), torch.randint(v, (7,))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = torch.randn(2, 7, dtype=work)
    mask = torch.ones(7, dtype=torch.bool)
    with instruction_set(name):
        l, h, grad = run(logits, labels, a, b, temperature=0.8)  # noqa: E741
    truth = true_logprobs(logits, labels, mask, 0.8)
    by_hand = logits.to(work).requires_grad_()
    log_p = torch.log_softmax(by_hand / 0.8, -1)
    eager_l, eager_h = log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    assert_within_budget(l, eager_l, truth[0])
    assert_within_budget(h, eager_h, truth[1])
    (eager_grad,) = torch.autograd.grad([eager_l, eager_h], by_hand, [a, b])
    true_grad = true_logit_grad(logits, labels, mask, 0.8, a, b)
    assert_within_budget(grad, eager_grad, true_grad)


def test_an_unknown_instruction_set_is_refused():
    from ppo_fast.ops import _C

    with pytest.raises(ValueError, match="no kernels for instruction set 'avx1024' here"):
        _C.use_instruction_set("avx1024")


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_a_row_depend_on_the_row_alone(name, dtype):
    """The bits do not depend on other rows, the alignment in memory or the number of threads."""
    v = 1500
    logits, labels = (torch.randn(33, v) * 4).to(dtype), torch.randint(v, (33,))
    a, b = torch.randn(2, 33)
    with instruction_set(name):
        together = run(logits, labels, a, b)
        with threads(1):
            alone_on_one = run(logits, labels, a, b)
        assert all(torch.equal(x, y) for x, y in zip(together, alone_on_one, strict=True))
        for i in range(33):
            place = torch.empty(v + 40, dtype=dtype)[i : i + v]
            place.copy_(logits[i])
            one = slice(i, i + 1)
            alone = run(place[None], labels[one], a[one], b[one])
            for single, batch in zip(alone, together, strict=True):
                assert torch.equal(single[0], batch[i])


def test_slices_are_read_in_place():
    logits = torch.randn(3, 6, 43)
    for view, rows in (
        (logits[:, :-1, :41], 15),
        (logits[:, 2], 3),
        (logits[1], 6),
        (logits[:, ::2], 9),
        (logits.transpose(0, 1), 18),
        (logits[0, 0].expand(5, 43), 5),
    ):
        read, layout = _rows(view)
        assert read.data_ptr() == view.data_ptr()
        assert layout["num_rows"] == rows
        labels = torch.randint(view.shape[-1], view.shape[:-1])
        a, b = torch.randn(2, *labels.shape)
        got, expected = run(view, labels, a, b), run(view.contiguous(), labels, a, b)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_offsets_beyond_32_bits():
    stride = 2**30  # row 2 starts at element 2^31; pages between the rows are never touched
    memory = torch.empty(2 * stride + 41, dtype=torch.bfloat16)
    logits = memory.as_strided((3, 41), (stride, 1))
    logits.copy_(torch.randn(3, 41))
    labels, mask = torch.tensor([1, 2, 3]), torch.ones(3, dtype=torch.bool)
    out = logprobs_from_logits(logits, labels, impl="cpp")
    truth = true_logprobs(logits, labels, mask, 1.0)
    torch.testing.assert_close(out.logprobs.double(), truth[0], rtol=0, atol=1e-5)


def test_a_label_outside_the_vocabulary_reads_no_memory():
    """The public function refuses such labels; in compiled code they are not checked."""
    logits, labels = torch.randn(3, 41), torch.tensor([7, -1, 41])  # 41 is just beyond
    logprobs, entropy, stats = torch.ops.ppo_fast.logprobs_forward_cpp.default(
        logits, labels, None, 1.0, True
    )
    assert logprobs.isnan().tolist() == [False, True, True]
    ones = torch.ones(3)
    grad = torch.ops.ppo_fast.logprobs_backward_cpp.default(
        logits, labels, None, 1.0, entropy, stats, ones, None
    )
    torch.testing.assert_close(grad[1:], -logits.softmax(-1)[1:])
    kept = torch.ops.ppo_fast.linear_logprobs_forward_cpp.default(
        torch.randn(3, 8), torch.randn(41, 8), None, labels, None, 1.0, 1.0, None, True, 0
    )
    assert kept[0].isnan().tolist() == [False, True, True]


def test_opcheck_logprobs():
    logits, labels = torch.randn(2, 3, 41), torch.randint(41, (2, 3))
    mask = torch.rand(2, 3) < 0.5
    a, b = torch.randn(2, 2, 3)
    for given in (None, mask):
        for with_entropy in (True, False):
            forward = (logits, labels, given, 0.7, with_entropy)
            torch.library.opcheck(torch.ops.ppo_fast.logprobs_forward_cpp.default, forward)
            _, entropy, stats = torch.ops.ppo_fast.logprobs_forward_cpp.default(*forward)
            for grads in ((a, b if with_entropy else None), (a, None)):
                backward = (logits, labels, given, 0.7, entropy, stats, *grads)
                torch.library.opcheck(torch.ops.ppo_fast.logprobs_backward_cpp.default, backward)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "dtype"), [(0, torch.float32), (1000, torch.bfloat16), (2**28, torch.float32)]
)
def test_opcheck_linear_logprobs(budget, dtype):
    hidden, weight = torch.randn(5, 8, dtype=dtype), torch.randn(41, 8, dtype=dtype)
    bias, labels = torch.randn(41, dtype=dtype), torch.randint(41, (5,))
    mask = torch.tensor([True, False, True, True, False])
    a, b = torch.randn(2, 5)
    for given in (None, mask):
        head = (hidden, weight, bias, labels, given, 0.7, 0.5, 20.0)
        forward = (*head, True, budget)
        torch.library.opcheck(torch.ops.ppo_fast.linear_logprobs_forward_cpp.default, forward)
        _, *saved = torch.ops.ppo_fast.linear_logprobs_forward_cpp.default(*forward)
        needed = [[True, True, True], [True, False, False], [False, True, False]]
        for needs in needed if given is None else needed[:1]:
            backward = (*head, *saved, a, b, True, needs)
            torch.library.opcheck(torch.ops.ppo_fast.linear_logprobs_backward_cpp.default, backward)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("budget", [0, 4 * 9 * 1500, 2**28])  # kept and recomputed tiles
@pytest.mark.parametrize("tile_bytes", [4 * 6 * 50, 4 * 9 * 1100, 2**23])
def test_rows_without_gradient_are_dropped(monkeypatch, tile_bytes, budget, masked):
    monkeypatch.setattr(linear_cpp, "_TILE_BYTES", tile_bytes)
    monkeypatch.setattr(linear_cpp, "_MIN_COLUMNS", 16)
    n, v = 9, 2500
    hidden, weight = torch.randn(n, 8), torch.randn(v, 8)
    labels, bias = torch.randint(v, (n,)), torch.randn(v)
    mask = torch.arange(n) % 3 != 1 if masked else None
    a, b = torch.randn(2, n)
    a[[0, 2, 5]] = b[[0, 2, 6]] = 0.0
    results = []
    for drop in (True, False):
        operands = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        out = linear_logprobs(
            *operands[:2],
            labels,
            bias=operands[2],
            mask=mask,
            softcap=5.0,
            logits_budget_bytes=budget,
            drop_zero_rows=drop,
            impl="cpp",
        )
        results.append(torch.autograd.grad(list(out), operands, [a, b], retain_graph=True))
        again = torch.autograd.grad(list(out), operands, [a, b])
        assert all(torch.equal(x, y) for x, y in zip(results[-1], again, strict=True))
    reference = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    out = linear_logprobs(
        *reference[:2], labels, bias=reference[2], mask=mask, softcap=5.0, impl="reference"
    )
    results.append(torch.autograd.grad(list(out), reference, [a, b]))
    for dropped, kept, expected in zip(*results, strict=True):
        torch.testing.assert_close(dropped, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)
    assert (results[0][0][[0, 2]] == 0).all()


@pytest.mark.parametrize("which", ["a", "b", "neither"])
def test_all_rows_without_gradient(which):
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(41, 8, requires_grad=True)
    out = linear_logprobs(hidden, weight, torch.randint(41, (4,)), impl="cpp")
    outputs = {"a": [out.logprobs], "b": [out.entropy], "neither": list(out)}[which]
    grads = torch.autograd.grad(outputs, [hidden, weight], [torch.zeros(4)] * len(outputs))
    assert all((grad == 0).all() for grad in grads)


def test_tiles_are_kept_within_the_budget():
    """Tiles are kept only if a gradient may be needed, and take at most the size of the logits."""
    weight, labels = torch.randn(41, 8), torch.zeros(5, dtype=torch.int64)
    sizes = []

    def pack(saved):
        sizes.append(saved.numel() * saved.element_size() if saved.ndim == 1 else 0)
        return saved

    for budget, expected in ((0, 0), (400, 400), (2**28, 5 * 41 * 4)):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            hidden = torch.randn(5, 8, requires_grad=True)
            linear_logprobs(hidden, weight, labels, logits_budget_bytes=budget, impl="cpp")
        assert max(sizes) == max(expected, labels.nbytes)
    _, _, _, kept = torch.ops.ppo_fast.linear_logprobs_forward_cpp.default(
        torch.randn(5, 8), weight, None, labels, None, 1.0, 1.0, None, True, 400
    )
    assert kept.nbytes == 400


def test_a_row_with_nan_or_inf_gives_nan_and_leaves_other_rows_unchanged():
    logits = torch.randn(5, 1500)
    logits[0, 3], logits[1, 700], logits[2] = math.nan, math.inf, -math.inf
    labels = torch.tensor([0, 1, 2, 3, 4])
    l, h, grad = run(logits, labels, torch.ones(5), torch.ones(5))  # noqa: E741
    for values in (l, h, grad.sum(-1)):
        assert values.isnan().tolist() == [True, True, True, False, False]


def test_inductor_compiles_the_public_function():
    compiled = torch.compile(logprobs_from_logits, fullgraph=True)
    logits, labels = torch.randn(3, 41, requires_grad=True), torch.tensor([3, 0, 40])
    grads = []
    for function in (compiled, logprobs_from_logits):
        out = function(logits * 2, labels, temperature=0.7, impl="cpp")
        (grad,) = torch.autograd.grad(out.logprobs.sum() + out.entropy[0], logits)
        grads.append((*out, grad))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)
