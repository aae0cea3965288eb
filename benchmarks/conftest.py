"""What the benchmarks share: the fixture `turns`, `--rounds`, and the contents of their JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import pytest
import torch
from sides import Side, ratios_to_ours, take_turns

from ppo_fast.ops import _C


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, help="rounds of every benchmark, to try them out")


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture
def rounds(request):
    """Return a function: rounds(n) is n, or the number that --rounds gives."""
    asked = request.config.getoption("--rounds")
    return lambda usual: asked or usual


@pytest.fixture
def show(benchmark, capsys):
    """Return a function that prints the sides in extra_info, others with their ratios to ours."""

    def show(decimals: int = 3) -> None:
        sides, unit = benchmark.extra_info["sides"], benchmark.extra_info["unit"]
        with capsys.disabled():
            print(f"\n{benchmark.extra_info['work']}")
            for name, amount in sides.items():
                ratios = " / ".join(ratios_to_ours(name, sides))
                print(f"  {amount:10.{decimals}f} {unit}  {name:50} {ratios}")

    return show


@pytest.fixture
def turns(benchmark, rounds, show):
    """Return turns(work, sides, rounds=..., warm=...): sides.take_turns, then show."""

    def turns(work: str, sides: dict[str, Side], *, rounds: int, warm: bool = True):
        medians = take_turns(benchmark, work, sides, rounds=_rounds(rounds), warm=warm)
        show()
        return medians

    _rounds = rounds
    return turns


def pytest_benchmark_update_machine_info(config, machine_info):
    names = ("ppo_fast", "torch", "transformers", "trl", "torchrl")
    for key in list(machine_info):
        if key not in ("cpu", "machine", "python_version"):
            del machine_info[key]
    machine_info["cpu"] = machine_info["cpu"].get("brand_raw") or platform.processor()
    machine_info |= {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": _C.instruction_set(),
        "versions": {name: version for name in names if (version := _version(name))},
    }


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keep only what benchmarks/report.py reads: the file is under version control."""
    output_json["benchmarks"] = [b["extra_info"] for b in output_json["benchmarks"]]
    del output_json["commit_info"]  # it would be the commit before the one that adds these results


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
