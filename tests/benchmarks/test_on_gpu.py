"""benchmarks/on_gpu: a dry run without a GPU, so that it does not fail on a borrowed one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ppo_fast.ops.backends.first_use import CHECKED

ROOT = Path(__file__).parents[2]
RUN = ROOT / "benchmarks" / "on_gpu" / "run.py"


def findings(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def dry_run(out: Path, *options: str) -> tuple[str, list[dict]]:
    """Return the output and the findings of a dry run."""
    command = [sys.executable, str(RUN), "--cpu", f"--out={out}", "--seconds=500", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    return done.stdout, findings(out)


@pytest.mark.slow
def test_every_stage_runs(tmp_path):
    printed, found = dry_run(
        tmp_path,
        "--stages=facts,attention,decoding,step,tests,kernels",
        "--tests=tests/ops/test_gae.py -k by_hand",
    )
    assert [line for line in found if "error" in line] == []
    training = [f for f in found if f["stage"].startswith("training attention")]
    assert isinstance(json.loads(training[0]["found"])["causal gqa flash"], float)
    (counted,) = [line for line in found if line["stage"] == "tests"]
    assert counted["run"] > 0
    assert counted["failed"] == 0
    stages = {line["name"]: line["rc"] for line in found if line["stage"] == "run"}
    assert stages == dict.fromkeys(
        ("facts", "attention", "decoding", "step", "tests", "kernels"), 0
    )
    values = [line for line in found if line["stage"] == "decoding: values"]
    assert len(values) == 6
    assert all(line["same_tokens"] and line["same_bits"] for line in values)
    kept = [line for line in found if line["stage"] == "decoding: kept graphs"]
    assert kept
    assert all(line["same_tokens"] for line in kept)
    steps = [line for line in found if line["stage"] == "step"]
    assert all(line["first_max_log_ratio"] < 0.1 for line in steps)
    assert all(f"\n{line['stage']}: " in printed for line in found)
    assert "failed 0" in printed


def test_every_checked_op_has_a_process_of_its_own(monkeypatch):
    """run.py does not import torch and has a copy of the list of checked ops."""
    monkeypatch.syspath_prepend(str(RUN.parent))
    import run as on_gpu

    assert on_gpu.OPS == CHECKED


def test_the_report_reads_what_the_stages_write():
    scripts = {path.name: path.read_text("utf-8") for path in RUN.parent.glob("*.py")}
    read = re.findall(r'of\(now, "([^"]+)"', scripts.pop("write_report.py"))
    assert len(read) > 10
    written = "\n".join(scripts.values())
    # a loop over tools names the stages of the sanitizers
    assert [name for name in read if f'"{name}"' not in written] == []


def test_a_stage_that_hangs_or_fails_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RUN.parent))
    import run as on_gpu

    run = on_gpu.Run(tmp_path, 60.0, cpu=True)
    assert run.stage("hangs", 8.0, [sys.executable, "-c", "import time; time.sleep(60)"]) == 124
    assert run.stage("fails", 20.0, [sys.executable, "-c", "print('a word'); 1 / 0"]) == 1
    assert run.stage("works", 20.0, [sys.executable, "-c", "pass"]) == 0
    found = findings(tmp_path)
    assert [(line["name"], line["rc"]) for line in found] == [
        ("hangs", 124),
        ("fails", 1),
        ("works", 0),
    ]
    log = (tmp_path / "log.txt").read_text()
    assert "a word" in log
    assert "ZeroDivisionError" in log
    late = on_gpu.Run(tmp_path, 5.0, cpu=True)
    assert late.stage("late", 20.0, [sys.executable, "-c", "pass"]) == 124
    assert '"skipped": "no time left"' in (tmp_path / "results.jsonl").read_text()


def test_the_summary_names_what_failed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RUN.parent))
    import summary

    results, junit = tmp_path / "results.jsonl", tmp_path / "junit.xml"
    results.write_text('{"stage": "facts", "at": 1.0, "gb_s": 4175.4653, "reason": null}\n')
    junit.write_text(
        '<testsuites><testsuite><testcase classname="tests.ops.test_gae" name="test_a[x]">'
        '<failure message="E  off by one&#10;more"/></testcase>'
        '<testcase classname="tests.ops.test_gae" name="test_a[y]"/></testsuite></testsuites>'
    )
    assert summary.lines(results, junit) == [
        "facts: gb_s 4175",
        "tests: 2, failed 1",
        "  tests.ops.test_gae::test_a x1: E  off by one",
    ]
    assert summary.lines(results, None) == ["facts: gb_s 4175"]


def test_the_report_is_made_from_the_stored_results(monkeypatch):
    monkeypatch.syspath_prepend(str(RUN.parent))
    import write_report

    assert (ROOT / "docs" / "gpu_measured.md").read_text() == write_report.document()
