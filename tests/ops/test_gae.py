"""gae against the definition, written out in Python's float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runnable import TRITON, WIDE, examples, generator, implementations
from torch._subclasses.fake_tensor import FakeTensorMode

from ppo_fast.ops.gae import GAE, gae

IMPLS = implementations("gae")
DTYPES = [torch.float32] if TRITON else [torch.float64, torch.float32]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture(autouse=True)
def small_blocks():
    """Of the Triton kernel, for few steps to need several: a step is 1 ms in the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        if TRITON:
            kernels = importlib.import_module("ppo_fast.ops.gae.triton")
            patch.setattr(kernels, "SCAN", kernels.SCAN._replace(block=32, num_warps=1))
        yield patch


@pytest.fixture(autouse=True)
def _poison():
    """Memory from torch.empty holds NaN: an output that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def written_out(*, rewards, values, mask, dones, bootstrap_value, lam, gamma):
    """Eq. 16 as the sum that it is, row by row over the valid steps, in Python floats."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    returns = advantages.clone()
    r, v, done = rewards.tolist(), values.tolist(), dones.tolist()
    for b in range(len(r)):
        valid = [t for t, keep in enumerate(mask[b].tolist()) if keep]
        after = [*(v[b][t] for t in valid[1:]), float(bootstrap_value[b])]
        for k, start in enumerate(valid):
            total, weight = 0.0, 1.0
            for t, value_after in zip(valid[k:], after[k:], strict=True):
                total += weight * (r[b][t] + (0.0 if done[b][t] else gamma * value_after) - v[b][t])
                weight *= gamma * float(lam[b])
                if done[b][t]:
                    break
            advantages[b, start], returns[b, start] = total, total + v[b][start]
    return advantages, returns


def random_case(num_rows, num_steps, *, seed=0, dtype=WIDE):
    """Random tensors for gae, with interior masks and NaN, inf and dones at the masked steps."""
    g = generator(seed)
    shape = (num_rows, num_steps)

    def draw(function, *size):
        return function(*size, generator=g, dtype=torch.float64).to(dtype)

    mask = draw(torch.rand, *shape) < 0.7
    return {
        "rewards": draw(torch.randn, *shape).masked_fill(~mask, torch.nan),
        "values": draw(torch.randn, *shape).masked_fill(~mask, torch.inf),
        "mask": mask,
        "dones": (draw(torch.rand, *shape) < 0.2) | ~mask,
        "bootstrap_value": draw(torch.randn, num_rows),
        "lam": draw(torch.rand, num_rows),
    }


def cast(case, dtype):
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.items()}


def assert_near(actual, expected, tolerance):
    for name, one, other in zip(GAE._fields, actual, expected, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def relaid(tensor, layout):
    """A copy in another memory layout."""
    if layout == "transposed":
        return tensor.t().clone(memory_format=torch.contiguous_format).t()
    if layout == "sliced":
        wide = tensor.new_ones([2 * size + 1 for size in tensor.shape])
        return wide[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
    return tensor.clone()


def near_float64(case, actual, expected):
    """Within rounding errors of the sums over a row; masked outputs are 0."""
    terms = [case[name].nan_to_num(0, 0).abs().sum() for name in ("rewards", "values")]
    scale = float(1.0 + sum(terms) + case["bootstrap_value"].abs().sum())
    dtype = case["rewards"].dtype
    assert_near(actual, expected, 8 * torch.finfo(dtype).eps * scale)
    for out in actual:
        assert out.dtype == dtype
        assert (out[~case["mask"]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=examples(60))
@given(
    num_rows=st.integers(0, 7),
    num_steps=st.integers(0, 12),
    seed=st.integers(0, 2**32 - 1),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0, "rows"]),
    left_out=st.sets(st.sampled_from(["mask", "dones", "bootstrap_value"])),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "transposed", "sliced"])] * 6),
)
def test_definition(dtype, impl, num_rows, num_steps, seed, gamma, lam, left_out, layouts):
    case = random_case(num_rows, num_steps, seed=seed, dtype=dtype)
    if "mask" in left_out:
        case["mask"].fill_(True)
        case["rewards"].nan_to_num_(0.5)
        case["values"].nan_to_num_(posinf=0.25)
    if "dones" in left_out:
        case["dones"].fill_(False)
    if "bootstrap_value" in left_out:
        case["bootstrap_value"].fill_(0.0)
    if lam != "rows":
        case["lam"].fill_(lam)
    expected = written_out(**case, gamma=gamma)

    pairs = zip(case.items(), layouts, strict=True)
    kwargs = {name: relaid(x, layout) for (name, x), layout in pairs}
    kwargs |= dict.fromkeys(left_out) | ({} if lam == "rows" else {"lam": lam})
    actual = gae(**kwargs, gamma=gamma, impl=impl)

    near_float64(case, actual, expected)
    for name in case.keys() - left_out - {"lam"}:
        assert torch.equal(case[name].nan_to_num(7.0), kwargs[name].nan_to_num(7.0))


def test_by_hand(impl):
    """gamma = lam = 1/2; the third step is masked, the second row's episode ends at its first."""
    actual = gae(
        torch.tensor([[1.0, 2.0, torch.nan, 4.0], [1.0, 2.0, 3.0, 4.0]]),
        torch.tensor([[1.0, 1.0, torch.nan, 2.0], [1.0, 1.0, 1.0, 1.0]]),
        mask=torch.tensor([[True, True, False, True], [True, False, False, False]]),
        dones=torch.tensor([[False, False, True, False], [True, False, False, False]]),
        bootstrap_value=torch.tensor([8.0, 8.0]),
        gamma=0.5,
        lam=0.5,
        impl=impl,
    )
    # delta: 4 + 8/2 - 2 = 6, 2 + 2/2 - 1 = 2, 1 + 1/2 - 1 = 0.5 in the first row; 1 - 1 = 0.
    assert actual.advantages.tolist() == [[1.375, 3.5, 0.0, 6.0], [0.0, 0.0, 0.0, 0.0]]
    assert actual.returns.tolist() == [[2.375, 4.5, 0.0, 8.0], [1.0, 0.0, 0.0, 0.0]]


def test_bootstrap_follows_the_last_valid_step(impl):
    zeros = torch.zeros(3, 4)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False], [False] * 4])
    out = gae(zeros, zeros, mask=mask, bootstrap_value=torch.ones(3), gamma=0.5, lam=0.0, impl=impl)
    assert out.advantages.tolist() == [[0, 0, 0, 0.5], [0, 0.5, 0, 0], [0, 0, 0, 0]]


def test_what_lies_beyond_a_done_does_not_matter(impl):
    ones = torch.ones(1, 4)
    wild = torch.tensor([[1.0, 1.0, torch.nan, 1.0]])
    kwargs = {"dones": torch.tensor([[False, True, False, True]]), "gamma": 0.9, "lam": 0.9}
    plain = gae(ones, ones, **kwargs, impl=impl).advantages
    beyond = gae(ones, wild, bootstrap_value=torch.tensor([torch.inf]), **kwargs, impl=impl)
    assert beyond.advantages[0, 2].isnan()
    assert torch.equal(plain[:, [0, 1, 3]], beyond.advantages[:, [0, 1, 3]])


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
def test_empty(impl, shape):
    empty = torch.ones(shape)
    for kwargs in ({}, {"mask": empty.bool(), "dones": empty.bool()}):
        out = gae(empty, empty, gamma=1.0, lam=1.0, impl=impl, **kwargs)
        assert out.advantages.shape == out.returns.shape == shape


@pytest.mark.parametrize("num_steps", [31, 33, 64, 70])
@pytest.mark.parametrize("left_out", [(), ("mask",), ("dones",), ("mask", "dones")])
def test_rows_longer_than_what_the_kernel_takes_at_once(impl, num_steps, left_out):
    case = random_case(4, num_steps, seed=num_steps)
    case["mask"][1] = True
    case["mask"][1, 4:-1] = False  # nothing counts for whole blocks, and then the carry does
    case["mask"][2, :-3] = False
    case["mask"][3, 3:] = False
    case["dones"] &= torch.rand(4, num_steps, generator=generator(1)) < 0.3
    if "mask" in left_out:
        case["mask"].fill_(True)
    if "dones" in left_out:
        case["dones"].fill_(False)
    case["rewards"].nan_to_num_(0.5)
    case["values"].nan_to_num_(posinf=0.25)
    expected = written_out(**case, gamma=0.99)
    near_float64(case, gae(**case | dict.fromkeys(left_out), gamma=0.99, impl=impl), expected)


def test_a_nan_goes_as_far_back_as_the_episode(impl):
    case = random_case(3, 70)
    case["mask"].fill_(True)[:, 20:50:3] = False
    case["dones"].fill_(False)[1, 10] = True
    case["rewards"] = torch.randn(3, 70, dtype=WIDE)
    case["values"] = torch.randn(3, 70, dtype=WIDE)
    case["rewards"][:2, 60] = torch.nan
    case["values"][2, 20] = torch.nan  # masked
    case["lam"][0] = 0.0
    out = gae(**case, gamma=0.9, impl=impl)
    valid = case["mask"].clone()
    assert out.advantages[0].isnan().equal(valid[0] & (torch.arange(70) <= 60))
    assert (
        out.advantages[1]
        .isnan()
        .equal(valid[1] & (torch.arange(70) <= 60) & (torch.arange(70) > 10))
    )
    assert out.advantages[2].isfinite().all()


def test_a_row_longer_than_the_real_block(impl, small_blocks):
    small_blocks.undo()
    case = random_case(1, 1100, dtype=torch.float32)
    expected = gae(**cast(case, torch.float64), gamma=0.99, impl="reference")
    assert_near(gae(**case, gamma=0.99, impl=impl), expected, 1e-5)


@pytest.mark.parametrize("num_steps", [64, 501])
def test_error_budget(impl, num_steps):
    """err(impl) <= 2 err(eager in float32) + a few eps, both against float64."""
    if TRITON and num_steps > 64:
        pytest.skip("long in the interpreter")
    case = random_case(5, num_steps, dtype=torch.float32)
    exact = gae(**cast(case, torch.float64), gamma=0.99, impl="reference")
    single = gae(**case, gamma=0.99, impl=impl)
    eager = gae(**case, gamma=0.99, impl="reference")
    for name in GAE._fields:
        error, allowed = (
            (getattr(out, name) - getattr(exact, name)).abs().max() for out in (single, eager)
        )
        assert 0 < allowed < 1e-4
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_the_row_alone(impl, dtype, threads):
    # Enough steps for three threads; the reference leaves threads to torch.
    num_rows, num_steps = {"cpp": (37, 1400), "reference": (7, 20), "triton": (3, 40)}[impl]
    case = random_case(num_rows, num_steps, dtype=dtype)
    threads(1)

    def rows(index):
        part = {name: x[index] for name, x in case.items()}
        return torch.stack(gae(**part, gamma=0.99, impl=impl), dim=1)

    together = rows(slice(None))
    assert torch.equal(torch.cat([rows([b]) for b in range(num_rows)]), together)
    order = torch.randperm(num_rows)
    assert torch.equal(rows(order), together[order])
    for count in (2, 3, 64):
        threads(count)
        assert torch.equal(rows(slice(None)), together)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(impl, half):
    case = random_case(3, 9, dtype=half)
    low = gae(**case, gamma=0.9, impl=impl)
    assert low.returns.dtype == torch.float32
    assert all(map(torch.equal, low, gae(**cast(case, torch.float32), gamma=0.9, impl=impl)))


def test_mixed_dtypes_are_computed_in_the_wider_one(impl):
    case = random_case(3, 9, dtype=torch.float32)
    mixed = case | {"rewards": case["rewards"].double()}
    if impl == "triton":
        with pytest.raises(NotImplementedError, match="gae got float64"):
            gae(**mixed, gamma=0.9, impl=impl)
        return
    out = gae(**mixed, gamma=0.9, impl=impl)
    assert out.returns.dtype == torch.float64
    assert all(map(torch.equal, out, gae(**cast(case, torch.float64), gamma=0.9, impl=impl)))


def test_no_gradient(impl):
    case = random_case(2, 3)
    case |= {name: x.requires_grad_() for name, x in case.items() if x.is_floating_point()}
    assert not any(out.requires_grad for out in gae(**case, gamma=0.9, impl=impl))
    with torch.inference_mode():
        gae(**case, gamma=0.9, impl=impl)


@pytest.mark.parametrize("left_out", [(), ("mask",), ("dones",), ("mask", "dones")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(impl, left_out, dtype):
    if impl == "reference":
        pytest.skip("no op")
    case = random_case(3, 5, dtype=dtype)
    case = {name: x.nan_to_num(0.5, 0.5) for name, x in case.items()}
    case["values"] = relaid(case["values"], "sliced")
    case |= dict.fromkeys(left_out)
    op = getattr(torch.ops.ppo_fast, f"gae_{impl}").default
    torch.library.opcheck(op, (), {**case, "gamma": 0.9})


def test_raw_op_checks_what_it_hands_to_the_kernel():
    good = {"mask": None, "dones": None, "gamma": 0.9}
    step, row = torch.ones(2, 3), torch.ones(2)
    for bad in (
        {"values": torch.ones(2, 2)},
        {"values": step.double()},
        {"mask": torch.ones(2, 3)},
        {"dones": torch.ones(1, 3, dtype=torch.bool)},
        {"bootstrap_value": torch.ones(1)},
        {"lam": torch.ones(1)},
    ):
        tensors = {"rewards": step, "values": step, "bootstrap_value": row, "lam": row}
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: got"):
            torch.ops.ppo_fast.gae_cpp.default(**(good | tensors | bad))


def test_compile_fullgraph(impl):
    torch.compiler.reset()
    dynamic = impl != "reference"  # the reference's loop is unrolled
    compiled = torch.compile(gae, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((3, 5), (4, 6)) if dynamic else ((2, 3),):
        case = random_case(*shape)
        for lam in (0.8, case["lam"]) if dynamic else (0.8,):
            kwargs = case | {"lam": lam, "gamma": 0.9, "impl": impl}
            assert all(map(torch.equal, compiled(**kwargs), gae(**kwargs)))


def test_fake_and_meta_tensors(impl):
    with FakeTensorMode():
        step, row = torch.ones(3, 5), torch.ones(3)
        out = gae(step, step, mask=step > 0, bootstrap_value=row, gamma=0.9, lam=row, impl=impl)
    assert out.advantages.shape == out.returns.shape == (3, 5)
    step = torch.ones(3, 5, device="meta", dtype=torch.bfloat16)
    out = gae(step, step, mask=step > 0, dones=step > 0, gamma=0.9, lam=0.9)  # a sync would raise
    assert out.returns.shape == (3, 5)
    assert out.returns.device.type == "meta"
    assert out.returns.dtype == torch.float32


STEP, ROW = torch.ones(2, 3), torch.ones(2)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"rewards \[6\]", {"rewards": torch.ones(6), "values": torch.ones(6)}),
        (ValueError, r"values \[2, 4\]", {"values": torch.ones(2, 4)}),
        (ValueError, r"mask \[2\]", {"mask": ROW.bool()}),
        (ValueError, r"dones is \[3, 2\], expected \[2, 3\]", {"dones": STEP.mT.bool()}),
        (ValueError, r"bootstrap_value is \[2, 1\]", {"bootstrap_value": ROW[:, None]}),
        (ValueError, r"lam is \[3\], expected \[2\]", {"lam": torch.ones(3)}),
        (ValueError, r"lam is \[\], expected \[2\]", {"lam": torch.tensor(0.5)}),
        (ValueError, r"gamma is 1\.5, expected a number in \[0, 1\]", {"gamma": 1.5}),
        (ValueError, r"lam is -0\.1", {"lam": -0.1}),
        (ValueError, r"lam is nan", {"lam": float("nan")}),
        (ValueError, r"dones is on meta", {"dones": STEP.bool().to("meta")}),
        (ValueError, r"values on meta", {"values": STEP.to("meta")}),
        (TypeError, r"rewards is torch.int64.*rewards.float\(\)", {"rewards": STEP.long()}),
        (TypeError, r"mask is torch.int64.*mask.bool\(\)", {"mask": STEP.long()}),
        (TypeError, r"dones is torch.float32.*dones.bool\(\)", {"dones": STEP}),
        (TypeError, r"lam is torch.int64.*lam.float\(\)", {"lam": ROW.long()}),
        (TypeError, r"values is list", {"values": [[1.0] * 3] * 2}),
        (TypeError, r"bootstrap_value is float", {"bootstrap_value": 0.0}),
        (TypeError, r"gamma is str", {"gamma": "0.9"}),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_bad_input(impl, error, match, change):
    with pytest.raises(error, match=f"^gae: .*{match}"):
        gae(**({"rewards": STEP, "values": STEP, "gamma": 0.9, "lam": 0.9, "impl": impl} | change))
