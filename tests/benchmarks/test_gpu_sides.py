"""The parts of GPU benchmarks that need no GPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import gpu_sides
import report
import test_bench_gpu
from thin_model import THIN

SMALL: dict[str, tuple[Any, ...]] = {
    "logprobs": (4, 37),
    "linear": (4, 37, 8),
    "losses": (3, 8),
    "gae": (3, 8),
    "sample": (3, 37),
    "attention": (3, 37, 6, 2, 8),
    "decoding": (THIN, 3, 5, 4),
}


def small_work(name: str) -> gpu_sides.GpuWork:
    make = gpu_sides.WORKS[name]
    reference = {} if name == "decoding" else {"impl": "reference"}
    return make.func(*SMALL[make.func.__name__], **make.keywords, **reference)


@pytest.fixture
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)


@pytest.fixture
def _others(monkeypatch):
    """Install modules with the names and signatures of the libraries compared with."""

    def install(name, **contents):
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    def log_p(logits, labels):
        return -torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def by_trl(logits, labels):
        logprobs = log_p(logits.flatten(0, 1), labels.flatten()).view(labels.shape)
        return logprobs, 0 * logprobs

    def chunked(hidden, weight, bias, labels, t, size, softcap, scale, outputs):
        logprobs = log_p(hidden @ weight.T, labels)
        return logprobs, (0 * logprobs if "entropy" in outputs else None), None, None, None

    def loss(hidden, weight, labels, *, reduction):
        assert reduction == "none"
        return -log_p(hidden @ weight.T, labels)

    install("trl.trainer.utils", selective_log_softmax_and_entropy=by_trl)
    install("trl.kernels.chunked_logprob", ChunkedLogProbFunction=SimpleNamespace(apply=chunked))
    install("liger_kernel.transformers.functional", liger_fused_linear_cross_entropy=loss)
    install("cut_cross_entropy", linear_cross_entropy=loss)


@pytest.mark.usefixtures("_nothing_is_compiled", "_others")
@pytest.mark.parametrize("name", gpu_sides.WORKS)
def test_sides_run(name):
    work = small_work(name)
    assert next(iter(work.sides)).startswith("ppo_fast")
    for name, side in work.sides.items():
        assert not isinstance(side, str), name
        side()


@pytest.mark.usefixtures("_nothing_is_compiled")
def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    work = small_work("linear, log-prob alone")
    assert work.sides["cut-cross-entropy"].startswith("not installed (")


@pytest.mark.usefixtures("_nothing_is_compiled")
def test_figures_of_a_gpu(monkeypatch, tmp_path):
    """Test all but the timing: entries, lines, the file, its section in README.md."""

    def timed(side):
        side()
        return {"ms": 2.0, "low": 1.0, "high": 3.0, "megabytes": 7.0}

    def fails():
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(test_bench_gpu, "timed", timed)
    work = small_work("logprobs forward")
    sides = {"ppo_fast": work.sides["ppo_fast"], gpu_sides.EAGER: work.sides[gpu_sides.EAGER]}
    sides |= {"other": fails, "third": "not installed (here)"}
    entry = test_bench_gpu.entry(work._replace(bytes=4_000_000, sides=sides))
    assert entry["sides"] == {"ppo_fast": 2.0, gpu_sides.EAGER: 2.0}
    assert entry["missing"] == {
        "other": "RuntimeError: no kernel image",
        "third": "not installed (here)",
    }
    rate = test_bench_gpu.copy_rate(2**20)
    assert rate == pytest.approx(2**21 / 2e6)
    text = "\n".join(test_bench_gpu.lines(entry, copy_rate=4.0))
    assert "2 GB/s,  50% of a copy" in text
    assert "third: not installed (here)" in text

    copying = {"work": "machine: copying", "unit": "GB/s", "sides": {"torch": 4.0}}
    path = test_bench_gpu.save([copying, entry], tmp_path, "NVIDIA L4", {"torch": "2.13.0"})
    assert path.name == "nvidia_l4.json"
    section = report.gpu_section(path)
    assert section.startswith("\n## On NVIDIA L4\n")
    assert "- copying: 4.0 GB/s" in section
    assert f"|  | {gpu_sides.EAGER} | 2 ms | 1.00x | 2 (50%) | 7 MB |" in section
    assert "|  | third | not installed (here) | | | |" in section

    sides = {"ppo_fast": fails}
    with pytest.raises(RuntimeError, match="no kernel image"):
        test_bench_gpu.entry(work._replace(sides=sides))
