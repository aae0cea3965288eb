"""Benchmarks on a GPU: ours, eager, torch.compile, and others' kernels where installed.

Written to results/<name of the GPU>.json by `make bench`.
"""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path

import gpu_sides
import pytest
import torch
from sides import Side, ratios_to_ours

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

RESULTS = Path(__file__).parents[1] / "results"


def timed(side: Side) -> dict[str, float]:
    """Return median, 20% and 80% milliseconds, and peak megabytes beyond those in use before."""
    from triton.testing import do_bench

    side()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    median, low, high = do_bench(side, quantiles=(0.5, 0.2, 0.8))
    return {"ms": median, "low": low, "high": high, "megabytes": peak}


def measured(side: Side | str, *, ours: bool) -> dict[str, float] | str:
    """Return the figures of a side, or why there are none; raise if ours fails."""
    if isinstance(side, str):
        return side
    try:
        return timed(side)
    except Exception as error:
        if ours:
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def entry(work: gpu_sides.GpuWork) -> dict:
    """Measure a work; return the benchmark in the form of results/*.json."""
    found = {
        name: measured(side, ours=name.startswith("ppo_fast")) for name, side in work.sides.items()
    }
    figures = {name: it for name, it in found.items() if not isinstance(it, str)}
    return {
        "work": work.work,
        "unit": "ms",
        "bytes": work.bytes,
        "sides": {name: it["ms"] for name, it in figures.items()},
        "spread": {name: (it["low"], it["high"]) for name, it in figures.items()},
        "megabytes": {name: it["megabytes"] for name, it in figures.items()},
        "missing": {name: it for name, it in found.items() if isinstance(it, str)},
    }


def lines(benchmark: dict, copy_rate: float) -> list[str]:
    table = [benchmark["work"]]
    for name, ms in benchmark["sides"].items():
        rate = benchmark["bytes"] / ms / 1e6
        of_copy = f"{rate:6.0f} GB/s, {rate / copy_rate:4.0%} of a copy" if rate else ""
        ratio = " / ".join(ratios_to_ours(name, benchmark["sides"]))
        memory = f"{benchmark['megabytes'][name]:8.0f} MB"
        table.append(f"  {ms:10.4f} ms {memory}  {name:45} {ratio:15} {of_copy}")
    return table + [f"  {name}: {why}" for name, why in benchmark["missing"].items()]


def copy_rate(nbytes: int = 2**30) -> float:
    """Measure the GB/s of a copy, read and written."""
    source = torch.empty(nbytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * nbytes / timed(lambda: target.copy_(source))["ms"] / 1e6


def save(benchmarks: list[dict], folder: Path, gpu: str, versions: dict[str, str]) -> Path:
    path = folder / (re.sub(r"\W+", "_", gpu.lower()) + ".json")
    date = datetime.datetime.now(datetime.UTC).isoformat()
    run = {"gpu": gpu, "versions": versions, "datetime": date, "benchmarks": benchmarks}
    path.write_text(json.dumps(run, indent=1) + "\n")
    return path


@pytest.fixture(scope="module")
def results(request):
    """Collect the benchmarks; save them where `make bench` runs all of them."""
    with torch.device("cuda"):
        rate = copy_rate()
    copying = {"work": "machine: copying 1 GiB, bytes read and written", "unit": "GB/s"}
    benchmarks = [copying | {"sides": {"torch": rate}}]
    yield benchmarks
    if request.config.getoption("benchmark_json"):
        versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
        save(benchmarks, RESULTS, torch.cuda.get_device_name(), versions)


@pytest.mark.parametrize("name", gpu_sides.WORKS)
def test_gpu(name, results, capsys):
    with torch.device("cuda"):
        work = gpu_sides.WORKS[name]()
    benchmark = entry(work)
    results.append(benchmark)
    with capsys.disabled():
        print("\n" + "\n".join(lines(benchmark, results[0]["sides"]["torch"])))
