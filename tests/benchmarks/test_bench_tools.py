"""Tools behind the figures of benchmarks/README.md: turns, ratios, tables, parts of a step."""

from __future__ import annotations

import ast
import importlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import tiny_model
from tiny_trainer import PROMPTS, tiny_trainer
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


class FakeBenchmark:
    """The part of pytest-benchmark's fixture that take_turns uses."""

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


def test_a_part_within_another_is_counted_once(monkeypatch):
    from step_parts import Clock

    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()

    def passes(seconds):
        now[0] += seconds

    def fails():
        passes(4)
        raise KeyError

    def outer():
        passes(1)
        clock.around("inner", passes)(2)
        with pytest.raises(KeyError):
            clock.around("inner", fails)()
        passes(8)

    with clock.part("rest"):
        clock.around("outer", outer)()
        passes(16)
    assert clock.seconds == {"outer": 9, "inner": 6, "rest": 16}


@pytest.mark.parametrize(
    ("critic", "options"),
    [("model", {}), ("head", {"num_layers_unfrozen": 1}), ("top", {"num_layers_unfrozen": 1})],
)
def test_the_parts_of_a_step_add_up_to_the_step(critic, options):
    from step_parts import seconds_of_parts, work_of_parts

    trainer = tiny_trainer(critic=critic, **options)
    untouched = {name: set(vars(owner)) for name, owner in vars(trainer).items() if is_ours(owner)}
    started = time.perf_counter()
    seconds = seconds_of_parts(trainer, lambda: trainer.train_step(PROMPTS))
    took = time.perf_counter() - started
    assert all(seconds.values())
    assert sum(seconds.values()) <= took
    assert work_of_parts(trainer).keys() == seconds.keys() - {"score", "rest"}
    assert untouched == {name: set(vars(getattr(trainer, name))) for name in untouched}


def is_ours(owner):
    return type(owner).__module__.startswith("ppo_fast.")


def test_work_of_parts():
    """Compare with the operations that PyTorch counts, for rows of one length."""
    from step_parts import work_of_parts

    trainer = tiny_trainer(critic="model", num_epochs=3, max_length=6)
    trainer.engine.eos_ids = list
    trainer.train_step(PROMPTS[:1] * 4)
    work, tokens = work_of_parts(trainer), trainer.last_rollout.tokens
    prompt, new = tokens.prompt_ids.shape[1], tokens.response_ids.shape[1]
    model = tiny_model(hidden=32)
    model.set_attn_implementation("eager")  # whose products are counted
    with FlopCounterMode(display=False) as counter:  # its attention looks at all keys
        states = model.model(tokens.input_ids, use_cache=False).last_hidden_state
        model.lm_head(states[:, -new:])
    keys = sum(range(1, prompt + new + 1)), (prompt + new) ** 2
    beyond = 4 * 2 * 4 * 32 * (keys[1] - keys[0])  # rows, layers, width
    # Some versions of transformers make the angles of the rotary embedding by a product too.
    counted = pytest.approx(counter.get_total_flops() - beyond, rel=1e-4)
    assert work["reference"].operations == counted
    assert work["forward"].operations == 3 * work["reference"].operations
    assert work["prefill"].operations < work["reference"].operations / 4
    trained = [*trainer.policy_model.parameters(), *trainer.value_model.parameters()]
    assert work["optimizer"].bytes == 3 * 10 * 4 * sum(p.numel() for p in trained)


def test_names_that_benchmarks_import_from_the_package_exist():
    """The tests run few of the benchmarks, so a name that moved would go unnoticed."""
    missing = []
    for path in BENCHMARKS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ppo_fast"):
                for alias in node.names:
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ModuleNotFoundError:
                        if not hasattr(importlib.import_module(node.module), alias.name):
                            missing.append(f"{path.name}: {node.module}.{alias.name}")
    assert missing == []
