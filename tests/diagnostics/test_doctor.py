"""``ppo-fast doctor`` from the command line, and its measurements with a fake clock."""

from __future__ import annotations

import json
import os

import pytest
import torch

from ppo_fast.cli.main import main
from ppo_fast.diagnostics import doctor, env
from ppo_fast.diagnostics.doctor import Sizes, measure
from ppo_fast.ops.backends import dispatch, first_use, library
from ppo_fast.ops.backends.first_use import CHECKED, Result
from ppo_fast.ops.backends.impls import COMPILED
from ppo_fast.ops.decode_attention import reference

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a machine without a GPU"),
    pytest.mark.skipif(bool(dispatch.missing("cpp")), reason=str(dispatch.missing("cpp"))),
]

TINY = Sizes(
    rows=32,
    vocab_size=48,
    odd_vocab_size=41,
    hidden_size=8,
    sequences=3,
    steps=5,
    cache=(3, 16, 2, 8),
    copied=64,
)


@pytest.fixture(autouse=True)
def _screen(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(first_use, "_known", {})


def run(capsys, *flags):
    """Return the exit status and the output of the command."""
    try:
        main(["doctor", *flags])
    except SystemExit as end:
        return end.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


@pytest.fixture
def stand_ins(monkeypatch):
    """Replace the Triton kernels by the C++ kernels, or by the reference where there are none."""
    of_attention = dict.fromkeys(("cpp", "triton"), reference.decode_attention)
    monkeypatch.setattr(library, "decode_attention", of_attention)
    monkeypatch.setitem(COMPILED, "decode_attention", ("cpp", "triton"))
    launchers = [x for x in vars(library).values() if isinstance(x, dict) and "triton" in x]
    for launcher in launchers:
        monkeypatch.setitem(launcher, "triton", launcher["cpp"])


@pytest.fixture
def pretended_gpu(monkeypatch, stand_ins):
    """Pretend that there is a GPU on which every call takes 2 ms."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(doctor, "main_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(env, "main_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(env, "_describe", lambda device: "a GPU")
    monkeypatch.setattr(doctor, "_is_lost", lambda device: False)
    monkeypatch.setattr(first_use, "installation", lambda device: "a GPU")
    monkeypatch.setattr(first_use, "_can_run_on", lambda device: True)
    monkeypatch.setattr(dispatch, "_triton_interpreted", lambda: True)
    check, measure = first_use.check, doctor.measure
    monkeypatch.setattr(first_use, "check", lambda op, device, impl="triton": check(op, cpu, impl))
    monkeypatch.setattr(
        doctor, "measure", lambda device, *_: measure(cpu, "cpp", TINY, doctor._median_ms)
    )
    monkeypatch.setattr(doctor, "_median_ms", lambda work: (work(), 2.0)[1])


def test_without_a_gpu(capsys):
    status, out = run(capsys)
    assert status == 0
    assert "No GPU here" in out
    assert "All checks passed." in out
    report = json.loads(out[out.index("{") : out.rindex("}") + 1])
    assert report["facts"]["torch"] == torch.__version__
    assert {c["op"] for c in report["checks"]} == {op for op in CHECKED if "cpp" in COMPILED[op]}
    assert all(c["ok"] and c["impl"] == "cpp" and c["error"] < 1e-2 for c in report["checks"])
    assert "speeds" not in report


def test_a_wrong_kernel_is_status_1(capsys, monkeypatch, tmp_path):
    launch = library.gae["cpp"]
    monkeypatch.setitem(library.gae, "cpp", lambda *a: (launch(*a)[0] + 1, launch(*a)[1]))
    path = tmp_path / "report[red].json"
    status, out = run(capsys, "--json", str(path))
    assert status == 1
    assert "report[red].json" in out, "as it is, no colour"
    assert "wrong: gae, cpp: relative errors: advantages (float32)" in out
    assert "All checks passed" not in out
    report = json.loads(path.read_text())
    assert [c["op"] for c in report["checks"] if not c["ok"]] == ["gae"]


def test_a_missing_extension_is_status_1(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "missing", lambda impl: "no compiler" if impl == "cpp" else None)
    monkeypatch.setattr(env, "missing", lambda impl: "no compiler" if impl == "cpp" else None)
    status, out = run(capsys)
    assert status == 1
    assert "could not be run: gae, cpp: no compiler" in out
    assert "wrong: " not in out
    assert '"error": "nan"' in out  # plain JSON has no NaN


@pytest.mark.slow
def test_interpreted(capfd, tmp_path):
    path = tmp_path / "report.json"
    main(["doctor", "--interpret", "--json", str(path)])
    assert "TRITON_INTERPRET" not in os.environ
    out = capfd.readouterr().out
    assert "cpu, interpreted" in out
    assert "No GPU here" not in out
    checks = json.loads(path.read_text())["checks"]
    interpreted = {c["op"] for c in checks if c["on"] == "cpu, interpreted"}
    assert interpreted == {op for op, impls in COMPILED.items() if "triton" in impls}
    assert all(c["ok"] for c in checks)


def test_in_a_process_that_interprets(capsys, monkeypatch, stand_ins):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    status, out = run(capsys, "--interpret")  # a process of its own starts no other
    assert status == 0
    assert out.count("cpu, interpreted") == 2 * len(CHECKED)  # in the table and in the JSON
    assert "No GPU here" not in out


def test_what_the_interpreter_cannot_run_is_not_called_wrong(capsys, monkeypatch, stand_ins):
    def fail(*_):
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(library.gae, "triton", fail)
    status, out = run(capsys)
    assert status == 1
    assert "could not be run: gae, triton: TypeError: only 0-dimensional arrays" in out
    assert "numpy below 2.4" in out
    assert "wrong" not in out
    assert "All checks passed" not in out


def test_on_a_gpu(capsys, pretended_gpu):
    status, out = run(capsys)
    assert status == 0
    report = json.loads(out[out.index("\n{") : out.rindex("}") + 1])
    assert report["facts"]["device"] == "a GPU"
    on_gpu = {c["op"] for c in report["checks"] if c["impl"] == "triton" and c["on"] == "cuda"}
    assert on_gpu == {op for op, impls in COMPILED.items() if "triton" in impls}
    assert {c["on"] for c in report["checks"] if c["impl"] == "cpp"} == {"cpu"}
    assert "speed; copying" in out
    assert len(report["speeds"]["works"]) == 13
    # It checked again and stored the result for the next processes.
    assert set(json.loads(first_use.memory_path().read_text())["a GPU"]) == on_gpu


def test_a_kernel_that_fails_at_full_size_is_status_1(capsys, monkeypatch, pretended_gpu):
    def fail(*_):
        raise RuntimeError("invalid argument\nand more")

    monkeypatch.setattr(doctor, "WORKS", (fail, doctor._token_ops))
    status, out = run(capsys)
    assert status == 1
    assert "wrong: fail: RuntimeError: invalid argument" in out
    assert '"work": "whiten, 3 x 5, float32"' in out  # the others were measured


def test_too_little_memory_is_no_failure(capsys, monkeypatch, pretended_gpu):
    def fail(*_):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(doctor, "WORKS", (fail,))
    status, out = run(capsys)
    assert status == 0
    assert "not measured" in out


@pytest.mark.usefixtures("stand_ins")
def test_floors():
    """With 1 ms per call, the floors follow from the bytes and products of each work."""
    speeds = measure(torch.device("cpu"), "cpp", TINY, lambda work: (work(), 1.0)[1])
    works = {work["work"]: work for work in speeds["works"]}
    assert all("error" not in work for work in works.values())
    copied = 2 * 4 * TINY.copied
    assert speeds["copy_gb_s"] == pytest.approx(copied / 1e6)
    forward = works["logprobs_from_logits forward, 32 x 41, bfloat16"]
    assert forward["gb_s"] == pytest.approx(32 * 41 * 2 / 1e6)
    assert forward["share_of_floor"] == pytest.approx(32 * 41 * 2 / copied)
    gae = works["gae, 3 x 5, float32"]
    assert gae["floor_ms"] == pytest.approx(15 * 17 / copied)
    attention = works["decode_attention, 3 x 2 of 16, 8 heads of 8 on 2, bfloat16"]
    assert attention["floor_ms"] == pytest.approx(2 * 3 * 2 * 2 * 8 * 2 / copied)
    # Four products of the size that was measured, and the operands once in and out.
    linear = works["linear_logprobs forward and backward, 32 x 48 x 8, bfloat16"]
    moved = 2 * 2 * (32 * 8 + 48 * 8)
    assert linear["share_of_floor"] == pytest.approx(4 + moved / copied)


@pytest.mark.parametrize("ok", [True, False])
def test_env_says_what_was_checked_on_the_gpu(capsys, monkeypatch, pretended_gpu, ok):
    monkeypatch.setattr(first_use, "check", lambda op, *_: Result(0.1, ok or op != "gae", "off"))
    if ok:
        main(["env"])
    else:
        with pytest.warns(RuntimeWarning, match="gae uses the slower reference"):
            main(["env"])
    out = " ".join(capsys.readouterr().out.split())
    number = sum("triton" in impls for impls in COMPILED.values())
    if ok:
        assert f"checked on this GPU: {number} ops right │" in out
    else:
        assert f"checked on this GPU: {number - 1} ops right, gae wrong │" in out
        assert "│ gae │ reference │ its triton kernels failed their check: off" in out


def test_env_without_a_gpu(capsys):
    main(["env"])
    assert "there is no GPU to run them on" in capsys.readouterr().out


def test_env_without_what_is_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("PPO_FAST_IMPL", "triton")
    monkeypatch.setattr(env, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(env, "missing", lambda impl: f"no {impl} here")
    main(["env"])
    out = " ".join(capsys.readouterr().out.split())
    assert "│ few_row_linear │ none │ PPO_FAST_IMPL=triton: few_row_linear has no such" in out
    assert "│ no-such-package │ not installed │" in out
    assert "│ Triton kernels │ no triton here │" in out


def test_after_an_error_that_ends_the_use_of_a_gpu_each_op_is_checked_in_a_process_of_its_own(
    pretended_gpu, monkeypatch, capsys
):
    """After such an error, every launch of this process fails."""
    lost, alone = [], []

    def check(op, device, *_):
        lost.append(op)
        return Result(float("nan"), False, "AcceleratorError: an illegal memory access")

    def in_own_process(op, device):
        alone.append(op)
        return Result(1e-7, True, "values (float32) 1.0e-07")

    monkeypatch.setattr(first_use, "check_and_remember", check)
    monkeypatch.setattr(doctor, "check_in_own_process", in_own_process)
    monkeypatch.setattr(doctor, "_is_lost", lambda device: bool(lost))
    status, out = run(capsys)
    assert status == 1
    assert [*lost, *alone] == [op for op in CHECKED if "triton" in COMPILED[op]]
    assert len(lost) == 1
    assert "an illegal memory access" in out


@pytest.mark.slow
def test_a_check_in_a_process_of_its_own_says_what_it_found():
    assert doctor.check_in_own_process("gae", torch.device("meta")).ok is False
    broken = doctor.check_in_own_process("no such op", torch.device("cpu"))
    assert not broken.ok
    assert broken.detail == "ModuleNotFoundError: No module named 'ppo_fast.ops.no such op'"
