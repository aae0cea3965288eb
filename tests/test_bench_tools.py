"""What the figures of benchmarks/README.md go through: turns, ratios, tables."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


class FakeBenchmark:
    """As much of pytest-benchmark's fixture as take_turns uses."""

    def __init__(self):
        self.extra_info = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=0.002))

    def pedantic(self, target, *, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


def test_sides_take_turns_after_an_untimed_call(monkeypatch):
    from sides import take_turns

    calls, clock = [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def side(name, seconds):
        def call():
            calls.append(name)
            clock[0] += seconds

        return call

    benchmark = FakeBenchmark()
    sides = {"ppo_fast": side("a", 0.002), "other": side("b", 0.004)}
    medians = take_turns(benchmark, "work", sides, rounds=3)
    assert "".join(calls).endswith("bbaa" * 3)
    assert medians == pytest.approx({"ppo_fast": 0.002, "other": 0.004})
    assert benchmark.extra_info["sides"] == pytest.approx({"ppo_fast": 2.0, "other": 4.0})


def test_tables(tmp_path):
    import report

    work = {
        "work": "some work",
        "unit": "ms",
        "sides": {"ppo_fast, a": 2.0, "ppo_fast, b": 8.0, "eager, x": 30.0, "eager, y": 4.0},
    }
    machine = {"work": "machine: copying", "unit": "GB/s", "sides": {"torch": 12.34}}
    run = {
        "machine_info": {
            "cpu": "A CPU",
            "cores": 2,
            "threads": 2,
            "kernels": "avx2",
            "python_version": "3.11.7",
            "versions": {"torch": "2.13.0"},
        },
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [work, machine],
    }
    (tmp_path / "cpu.json").write_text(json.dumps(run))
    lines = report.section(tmp_path / "cpu.json").splitlines()
    assert "- copying: 12.3 GB/s" in lines
    assert lines[-4:] == [
        "| some work | ppo_fast, a | 2 ms |  |",
        "|  | ppo_fast, b | 8 ms |  |",
        "|  | eager, x | 30 ms | 15x / 3.75x |",
        "|  | eager, y (the best eager form) | 4 ms | 2.00x / 0.50x |",
    ]
