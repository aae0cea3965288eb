"""The check on first use. In an ordinary process the C++ kernels replace the Triton kernels, and
the reference does where there is no C++ kernel."""

from __future__ import annotations

import json
import math
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from runnable import TRITON
from torch._subclasses.fake_tensor import FakeTensorMode

import ppo_fast
from ppo_fast import ops
from ppo_fast.ops.backends import dispatch, first_use, library
from ppo_fast.ops.backends.dispatch import choose
from ppo_fast.ops.backends.first_use import CHECKED, Result, check
from ppo_fast.ops.backends.impls import COMPILED
from ppo_fast.ops.decode_attention import reference
from ppo_fast.ops.sample_tokens import check as sample_tokens_check

pytestmark = [
    pytest.mark.parametrize("impl", ["triton" if TRITON else "cpp"]),
    pytest.mark.skipif(bool(dispatch.missing("triton")), reason=str(dispatch.missing("triton"))),
    pytest.mark.skipif(bool(dispatch.missing("cpp")), reason=str(dispatch.missing("cpp"))),
]

OPS = [op for op in CHECKED if not TRITON or "triton" in COMPILED[op]]
RAW_OPS = {
    "logprobs_from_logits": ("logprobs_forward", "logprobs_backward"),
    "linear_logprobs": ("linear_logprobs_forward", "linear_logprobs_backward"),
    "whiten": ("whiten", "whiten_backward"),
}
OUTPUTS = [
    (op, raw, place)
    for op in (OPS if not TRITON else ["logprobs_from_logits"])  # seconds a case in the interpreter
    for raw in RAW_OPS.get(op, (op,))
    for place, output in enumerate(
        getattr(torch.ops.ppo_fast, f"{raw}_triton").default._schema.returns
    )
    if output.name != "kept"  # the case recomputes all tiles
]


@pytest.fixture(autouse=True)
def gpu(impl, tmp_path, monkeypatch):
    """Return the device, treated as a GPU on which nothing was checked yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(first_use, "_known", {})
    device = torch.get_default_device()
    if device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr(first_use, "_can_run_on", lambda device: True)
    monkeypatch.setattr(first_use, "installation", lambda device: "a GPU")
    monkeypatch.setitem(dispatch.FASTEST, "cpu", "triton")
    if impl == "cpp":
        monkeypatch.setattr(dispatch, "_triton_interpreted", lambda: True)
        for op in OPS:
            monkeypatch.setitem(COMPILED, op, ("cpp", "triton"))
            for raw in RAW_OPS.get(op, (op,)):
                launchers = getattr(library, raw)
                stand_in = launchers.get("cpp", reference.decode_attention)
                monkeypatch.setitem(launchers, "triton", stand_in)
    return device


@pytest.fixture
def spoil(monkeypatch):
    """Return spoil(raw op, change), which applies ``change`` to the launcher's outputs."""

    def patch(raw, change):
        launch = getattr(library, raw)["triton"]

        def wrong(*arguments):
            out = launch(*arguments)
            return change((out,))[0] if isinstance(out, torch.Tensor) else change(out)

        monkeypatch.setitem(getattr(library, raw), "triton", wrong)

    return patch


def logprobs_off(outputs):
    logprobs, *others = outputs
    return logprobs + 0.01, *others


def never(*_):
    raise AssertionError("is not to be called")


def use_logprobs(device, **how):
    logits = torch.randn(3, 41, device=device)
    return logits, ops.logprobs_from_logits(logits, torch.tensor([1, 2, 3], device=device), **how)


@contextmanager
def old_interpreters_ignored():
    """Within the block, ignore the warnings of Triton 3.4 and 3.6."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Conversion of an array", DeprecationWarning)
        yield


def next_process(monkeypatch):
    monkeypatch.setattr(first_use, "_known", {})


@pytest.mark.parametrize("op", OPS)
def test_correct_kernels_pass(op, gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "_choose_by_device", never)  # it would recurse
    result = check(op, gpu)
    assert result.ok
    assert 0 < result.error < 1e-2
    assert "e-08" in result.detail or "e-07" in result.detail


@pytest.mark.parametrize(("op", "raw", "place"), OUTPUTS)
def test_an_error_in_any_output_fails_the_check(op, raw, place, gpu, spoil):
    def off(outputs):
        x = outputs[place]
        assert x.numel() > 0
        x = x * 1.05 if x.is_floating_point() else x + 1
        return (*outputs[:place], x, *outputs[place + 1 :])

    spoil(raw, off)
    assert not check(op, gpu).ok


def test_auto_falls_back_to_the_reference_with_one_warning(gpu, spoil, monkeypatch):
    spoil("logprobs_forward", logprobs_off)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with old_interpreters_ignored():
            logits, out = use_logprobs(gpu)
            use_logprobs(gpu)
            choice = choose("logprobs_from_logits", "auto", gpu)
    (warning,) = caught
    said = str(warning.message)
    assert warning.filename == __file__  # the caller of the op
    assert "logprobs_from_logits" in said
    assert "logprobs (float32)" in said
    assert "entropy" not in said  # the entropy is correct
    assert "ppo-fast doctor" in said
    assert choice.impl == "reference"
    assert "logprobs (float32)" in choice.reason
    wanted = torch.log_softmax(logits, -1)[torch.arange(3), [1, 2, 3]]
    torch.testing.assert_close(out.logprobs, wanted)
    # Other ops are checked separately.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("kl_estimate", "auto", gpu).impl == "triton"


def test_an_explicit_impl_is_used_without_a_check(gpu, spoil, monkeypatch):
    spoil("logprobs_forward", logprobs_off)
    monkeypatch.setattr(first_use, "check", never)
    logits, out = use_logprobs(gpu, impl="triton")
    wanted = torch.log_softmax(logits, -1)[torch.arange(3), [1, 2, 3]]
    torch.testing.assert_close(out.logprobs, wanted + 0.01)
    monkeypatch.setenv("PPO_FAST_IMPL", "triton")
    assert choose("logprobs_from_logits", "auto", gpu).impl == "triton"


def test_a_wrong_gradient_and_nan_are_named(gpu, spoil):
    spoil("logprobs_backward", lambda out: (out[0] * 1.1,))
    result = check("logprobs_from_logits", gpu)
    assert not result.ok
    assert result.detail.startswith("relative errors: gradient of logits (float32) 1.0e-01")
    spoil("logprobs_forward", lambda out: (out[0].fill_(math.nan), *out[1:]))
    result = check("logprobs_from_logits", gpu)
    assert "logprobs (float32) inf" in result.detail
    assert result.error == math.inf
    assert first_use._error(torch.zeros(2), torch.zeros(3)) == math.inf  # another shape


def test_a_kernel_that_raises_is_not_used_and_tried_again_later(gpu, monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler found\nand a long listing")

    with monkeypatch.context() as broken:
        broken.setitem(library.logprobs_forward, "triton", fail)
        with pytest.warns(RuntimeWarning, match="RuntimeError: no compiler found"):
            assert choose("logprobs_from_logits", "auto", gpu).impl == "reference"
        assert choose("logprobs_from_logits", "auto", gpu).impl == "reference"
    assert not first_use.memory_path().exists()
    next_process(monkeypatch)
    assert choose("logprobs_from_logits", "auto", gpu).impl == "triton"


def test_the_result_is_remembered(gpu, monkeypatch):
    found = first_use.first_use("logprobs_from_logits", gpu)
    assert found.ok
    with monkeypatch.context() as later:
        later.setattr(first_use, "check", never)
        later.setattr(first_use, "_can_run_on", never)
        assert first_use.first_use("logprobs_from_logits", gpu) is found
    next_process(monkeypatch)
    with monkeypatch.context() as later:
        later.setattr(first_use, "check", never)
        assert first_use.first_use("logprobs_from_logits", gpu) == found
    next_process(monkeypatch)
    monkeypatch.setattr(first_use, "installation", lambda device: "another driver")
    monkeypatch.setattr(first_use, "check", lambda *_: Result(0.5, False, "is off"))
    with pytest.warns(RuntimeWarning, match="is off"):
        assert not first_use.first_use("logprobs_from_logits", gpu).ok
    assert len(json.loads(first_use.memory_path().read_text())) == 2


def test_a_wrong_kernel_is_remembered_and_each_process_warns(gpu, spoil, monkeypatch):
    spoil("logprobs_forward", logprobs_off)
    for _ in range(2):
        next_process(monkeypatch)
        said = pytest.warns(RuntimeWarning, match="failed the check on first use")
        with said, old_interpreters_ignored():
            assert not first_use.first_use("logprobs_from_logits", gpu).ok
        monkeypatch.setattr(first_use, "check", never)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"a GPU": 3}',
        b'{"a GPU": {"logprobs_from_logits": {"error": 0}}}',
        b'{"a GPU": {"logprobs_from_logits": [0, true, ""]}}',
        b'{"a GPU": {"logprobs_from_logits": {"error": 0, "ok": "no", "detail": ""}}}',
    ],
)
def test_a_damaged_file_of_results_is_rewritten(gpu, text, monkeypatch):
    path = first_use.memory_path()
    path.parent.mkdir()
    path.write_bytes(text)
    monkeypatch.setattr(first_use, "installation", lambda device: "a GPU")
    found = first_use.first_use("logprobs_from_logits", gpu)
    assert found.ok
    assert first_use.remembered("logprobs_from_logits", gpu) == found


def test_without_a_writable_folder_each_process_checks_again(gpu, tmp_path, monkeypatch):
    (tmp_path / "ppo_fast").write_text("is a file")
    calls = []
    monkeypatch.setattr(first_use, "check", lambda *_: calls.append(1) or Result(0.0, True, ""))
    for _ in range(2):
        assert first_use.first_use("logprobs_from_logits", gpu).ok
    next_process(monkeypatch)
    assert first_use.first_use("logprobs_from_logits", gpu).ok
    assert len(calls) == 2


def test_concurrent_writers_leave_a_whole_file(tmp_path):
    result = Result(1e-7, True, "x" * 5000)

    def write(i):
        first_use._remember(f"op {i}", "a GPU", result)
        json.loads(first_use.memory_path().read_text())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(100)))
    assert [p.name for p in (tmp_path / "ppo_fast").iterdir()] == ["self_check.json"]


def test_concurrent_callers_check_once(gpu, monkeypatch):
    calls = []

    def slow(*_):
        calls.append(1)
        time.sleep(0.1)
        return Result(0.0, True, "")

    monkeypatch.setattr(first_use, "check", slow)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: first_use.first_use("gae", gpu), range(8)))
    assert len(calls) == 1
    assert all(r.ok for r in results)


@pytest.mark.parametrize("mode", ["fake", "inference", "autocast", "meta device", "no grad"])
def test_modes_of_the_caller_do_not_reach_the_check(mode, gpu):
    modes = {
        "fake": FakeTensorMode(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast(gpu.type, dtype=torch.bfloat16),
        "meta device": torch.device("meta"),
        "no grad": torch.no_grad(),
    }
    with modes[mode]:
        assert check("logprobs_from_logits", gpu).ok


def test_compiled_callers_check_too(gpu, spoil):
    def run(logits, labels):
        return ops.logprobs_from_logits(logits, labels).logprobs

    logits, labels = torch.randn(3, 41, device=gpu), torch.tensor([1, 2, 3], device=gpu)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, labels), run(logits, labels))
    assert first_use.remembered("logprobs_from_logits", gpu).ok


def test_a_compiled_caller_falls_back_to_the_reference(gpu, spoil):
    spoil("logprobs_forward", logprobs_off)
    logits, labels = torch.randn(3, 41, device=gpu), torch.tensor([1, 2, 3], device=gpu)

    def run(logits, labels):
        return ops.logprobs_from_logits(logits, labels).logprobs

    with pytest.warns(RuntimeWarning, match="failed the check"), old_interpreters_ignored():
        out = torch.compile(run, fullgraph=True, backend="aot_eager")(logits, labels)
    torch.testing.assert_close(out, torch.log_softmax(logits, -1)[torch.arange(3), labels])


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a machine without a GPU")
def test_kernels_are_used_unchecked_while_they_cannot_run(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(first_use, "check", never)
    device = torch.device("cuda", 0)
    assert choose("logprobs_from_logits", "auto", device).impl == "triton"
    # A GPU whose stream is being captured, and a fake tensor's device beyond the real ones.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert first_use.first_use("logprobs_from_logits", device).ok
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert first_use.first_use("logprobs_from_logits", torch.device("cuda", 1)).ok
    assert not first_use._known


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands for machines with other GPUs")
def test_a_result_holds_for_one_installation(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(first_use, "driver", lambda: "570.1")
    words = first_use.installation(torch.device("cuda", 0))
    assert words.startswith(f"NVIDIA X, driver 570.1, torch {torch.__version__}, triton ")
    assert f", ppo_fast {ppo_fast.__version__}, kernels " in words


@pytest.mark.parametrize(
    "kind", ["UNIX x86_64 Kernel Module", "UNIX Open Kernel Module for x86_64"]
)
def test_the_driver_by_its_version(kind, monkeypatch):
    text = f"NVRM version: NVIDIA {kind}  570.86.15  Release Build\nGCC version:  gcc 12.2.0"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert first_use.driver() == "570.86.15"


def test_the_driver_where_it_is_hidden(monkeypatch):
    def hidden(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", hidden)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    assert first_use.driver() == "of CUDA 12080"


def test_no_draw_of_the_check_is_a_near_tie(gpu):
    """Kernels with other rounding errors must draw the same tokens."""
    case = sample_tokens_check.case
    side = ("reference", torch.device("cpu"), torch.float32)

    class Shifted(first_use.Side):
        def normal(self, *shape, scale=1.0):
            x = super().normal(*shape, scale=scale)
            return x + 1e-4 * torch.randn_like(x)

    exact = case(first_use.Side(*side, torch.float64))
    shifted = case(Shifted(*side, torch.float64))
    for name in ("tokens", "truncated tokens"):
        assert torch.equal(exact[name], shifted[name])
