"""The computed report of the Triton kernels."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
if os.environ.get("PPO_FAST_TEST_TRITON") == "1":  # the interpreter compiles nothing
    pytest.skip("needs Triton's compiler", allow_module_level=True)

import gpu_report
import gpu_steps
import gpu_updates
import gpu_works
import report
from gpu_report import GPUS, Step
from rich.console import Console
from sass import Counts, Executed, executed
from thin_model import THIN
from triton_cases import CASES

ROOT = Path(__file__).resolve().parents[2]
RESULT = json.loads(gpu_report.RESULT.read_text())

LOOP = """
kernel:
S2R R0, SR_TID.X ;
@P0 BRA `(.L_x_9) ;
.L_x_1:
@!P1 LDG.E.128 R4, desc[UR4][R2.64] ;
@P2 BRA `(.L_x_2) ;
MUFU.EX2 R5, R5 ;
FADD R6, R5, R6 ;
.L_x_2:
STG.E.U8 desc[UR4][R8.64], R6 ;
BRA.U UP0, `(.L_x_1) ;
.L_x_9:
LDG.E R4, desc[UR4][R2.64] ;
STG.E.64 [R2.64], R4 ;
EXIT ;
.L_x_3:
BRA `(.L_x_3);
$__internal_0_$__cuda_sm20_div_s64:
LDG.E.128 R4, [R2.64] ;
""".strip().splitlines()


def test_a_loop_is_found_and_its_longest_path_counted():
    loop = Counts(wide=1, bytes=17, instructions=6, special=1)
    assert executed(LOOP) == Executed(
        Counts(wide=1, bytes=17 + 12, instructions=2 + 6 + 3, special=1), (loop,)
    )


def test_of_two_paths_the_one_with_wide_accesses_is_counted():
    sass = """
@P0 BRA `(.L_x_1) ;
LDG.E.128 R4, [R2.64] ;
EXIT ;
.L_x_1:
LDG.E.64 R4, [R2.64] ;
LDG.E.64 R6, [R2.64+0x8] ;
EXIT ;""".strip().splitlines()
    assert executed(sass) == Executed(Counts(wide=1, bytes=16, instructions=3), ())


def test_a_call_of_a_label_leaves_the_loop():
    """Code for sm_80 ends some loops like this."""
    sass = """
.L_x_1:
LDG.E.S16 R4, [R2.64] ;
@P1 CALL.REL.NOINC `(.L_x_2) ;
BRA `(.L_x_1) ;
.L_x_2:
EXIT ;""".strip().splitlines()
    loop = Counts(bytes=2, instructions=3)
    assert executed(sass) == Executed(Counts(bytes=2, instructions=3), (loop,))


def test_of_nested_loops_the_inner_one_streams():
    sass = """
.L_x_1:
LDG.E R4, [R2.64] ;
.L_x_2:
LDG.E R4, [R2.64] ;
@P1 BRA `(.L_x_2) ;
@P2 BRA `(.L_x_1) ;
EXIT ;""".strip().splitlines()
    assert executed(sass).loops == (Counts(bytes=4, instructions=2),)


def test_counts_of_several_turns_of_a_loop():
    found = Executed(Counts(1, 20, 50, 3), (Counts(1, 16, 10, 2),))
    assert found.in_all(1) == found.program
    assert found.in_all(4) == Counts(4, 68, 80, 9)


def a_step(**changes) -> Step:
    code = SimpleNamespace(arch=90, num_warps=8)
    step = Step(code, Executed(Counts(0, 0, 100, 4), ()), 132 * 50, 1024, 132 * 50 * 1024, 3.35e9)
    return step._replace(**changes)


def test_bounds():
    """A multiprocessor has 50 programs of 8 warps, and issues 4 instructions and half a special one
    per clock."""
    bounds = a_step().bounds(GPUS["H100"])
    assert bounds == pytest.approx(
        {
            "bandwidth": 1.0,
            "issue": 50 * 8 * 100 / 4 / 1.98e6,
            "special": 50 * 8 * 4 * 2 / 1.98e6,
        }
    )


def test_bounds_of_a_grid_smaller_than_the_gpu():
    """A multiprocessor with one warp issues one instruction per clock."""
    step = a_step(programs=3, code=SimpleNamespace(arch=90, num_warps=1))
    assert step.bounds(GPUS["H100"])["issue"] == pytest.approx(100 / 1.98e6)
    one_more = a_step(programs=133)
    assert one_more.bounds(GPUS["H100"])["issue"] == pytest.approx(2 * 8 * 100 / 4 / 1.98e6)


def test_times_add_up_over_launches():
    work = gpu_works.Work(calls=lambda: iter(()), elements=1, dtype="", published={})
    steps = [a_step(), a_step(bytes=1.0)]
    times = gpu_report.times(work, steps, GPUS["H100"])
    issue = 50 * 8 * 100 / 4 / 1.98e6
    assert times["least"] == pytest.approx(1.0 + issue, rel=1e-3)
    assert times["bound"] == "bandwidth"
    # The launch bound by issue takes longer than either of those bound by bandwidth.
    slow = a_step(executed=Executed(Counts(0, 0, 30000, 0), ()), bytes=1.0)
    assert slow.bounds(GPUS["H100"])["issue"] == pytest.approx(1.5, rel=0.1)
    assert gpu_report.times(work, [slow, a_step()], GPUS["H100"])["bound"] == "issue"
    assert gpu_report.times(work, [slow, a_step(), a_step()], GPUS["H100"])["bound"] == "bandwidth"
    times = gpu_report.times(work._replace(flops=2 * 989e9), steps, GPUS["H100"])
    assert times["least"] == pytest.approx(2.0 + 1.0 + issue, rel=1e-3)
    assert times["bound"] == "products"


SOME = (80, 89, 90, 120)  # those of GPUS, and of README.md


@pytest.fixture(scope="module")
def small():
    """Compute the report of two works."""
    works = {
        "both": gpu_works.bf16_logits(gpu_works.BOTH, 512, 16384, H100="0.1 (someone)"),
        "head": gpu_works.of_head(1024, 64, 8192, products=3),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_updates, "as_lines", lambda: RESULT["updates"])
        patch.setattr(gpu_report, "WORKS", works)
        patch.setattr(gpu_report, "ARCHITECTURES", SOME)
        yield gpu_report.compute()


@pytest.mark.slow
def test_bytes_are_those_that_must_be_moved(small):
    """Logits are read once in the forward pass, and read and written once in the backward pass."""
    forward, backward, *_ = small["kernels"]
    assert (forward["kernel"], forward["dtype"]) == ("logprobs_forward_kernel", "bfloat16")
    assert set(forward["arch"]) == {str(arch) for arch in SOME}
    for arch in forward["arch"]:
        assert forward["arch"][arch]["bytes"] == pytest.approx(2, abs=0.01)
        assert backward["arch"][arch]["bytes"] == pytest.approx(4, abs=0.01)
    both, head = small["works"]
    assert both["bytes"] == pytest.approx(6, abs=0.01) == both["floor"]
    assert head["bytes"] == pytest.approx(4 + 4 + 2, abs=0.1)
    assert head["floor"] > 8  # the logits kept
    assert head["gpus"]["L4"]["products"] == pytest.approx(6 * 1024 * 64 * 8192 / 121e9, rel=1e-3)


@pytest.mark.slow
def test_instructions_of_the_streaming_loop(small):
    """An element takes one exponential, and a few other instructions."""
    for it in small["kernels"][0]["arch"].values():
        assert it["wide"] >= 1
        assert 1 <= it["special"] < 2
        assert 5 < it["instructions"] < 25


@pytest.mark.slow
def test_printed_tables_say_computed(small):
    console = Console(file=StringIO(), width=200)
    gpu_report.show(small, console)
    text = console.file.getvalue()
    assert text.startswith("Computed, not measured")
    assert text.count("(computed, not measured)") == 4
    assert "0.1 (someone)" in text
    assert all(text.count(gpu) >= 2 for gpu in GPUS)


@pytest.mark.slow
def test_main_writes_the_report(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_report, "compute", lambda progress: small)
    monkeypatch.setattr(gpu_report, "RESULT", tmp_path / "gpu_computed.json")
    gpu_report.main()
    assert json.loads((tmp_path / "gpu_computed.json").read_text()) == small
    section = report.computed_section(tmp_path / "gpu_computed.json")
    assert "computed, not measured" in section.splitlines()[1]
    rows = sum(len(small[part]) for part in ("kernels", "works", "decoding", "updates"))
    assert section.count("\n| ") == 4 + rows


@pytest.mark.slow
def test_runs_as_a_script():
    code = "import gpu_report, runpy; runpy.run_path('benchmarks/report.py')"
    environment = os.environ | {"PYTHONPATH": "benchmarks:benchmarks/gpu_computed"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_every_common_case_is_reported():
    reported = {
        (launcher.__module__, launcher.__name__)
        for work in gpu_works.WORKS.values()
        for launcher, _ in work.calls()
    }
    for name, case in CASES.items():
        folder, _, function = case.launcher.partition("/")
        if case.common:
            assert (f"ppo_fast.ops.{folder}.triton", function) in reported, name


def test_the_stored_report_has_every_kernel():
    names = {
        name
        for file in (ROOT / "ppo_fast" / "ops").rglob("*.py")
        for name in re.findall(r"^@kernel\ndef (\w+)", file.read_text(), re.MULTILINE)
    }
    assert names == {line["kernel"] for line in RESULT["kernels"]}


def test_the_stored_report_has_the_current_works():
    assert [line["work"] for line in RESULT["works"]] == list(gpu_works.WORKS)
    assert RESULT["gpus"] == {name: gpu._asdict() for name, gpu in GPUS.items()}


def test_launches_and_bytes_of_a_decoding_step():
    """The launches of a Llama layer are about those counted by hand in transformers' code."""
    one, three = (gpu_steps.launches(THIN | {"num_hidden_layers": n}) for n in (1, 3))
    per_layer = (three - one) / 2
    # 7 products, 2 norms of 6, rotation of 2 tensors in 5 each, 2 writes to the cache, attention,
    # 2 sums, silu and its product, and copies of tensors that lie in another order
    assert 30 < per_layer < 45
    assert per_layer == int(per_layer)
    assert 10 < one - per_layer < 80  # rotary tables, mask, head, drawing and what is noted of it
    settings = gpu_steps.MODELS["SmolLM2-135M"]
    assert gpu_steps.weight_bytes(settings) == 2 * 134_515_008
    assert gpu_steps.cache_bytes(settings) == 2 * 2 * 30 * 3 * 64 * 32 * 512
    untied = gpu_steps.MODELS["Llama-3.1-8B"]
    assert gpu_steps.weight_bytes(untied) == 2 * (8_030_261_248 - 128256 * 4096)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packed", "tokens", "pairs"),
    # two responses to a prompt of 5 tokens, one to another of 7, each without its last token
    [(False, 3 * 10, 3 * 55), (True, 5 + 2 + 1 + 10, 15 + (2 * 5 + 3) + (5 + 1) + 55)],
)
def test_tokens_launches_and_operations_of_an_update(packed, tokens, pairs):
    """A token takes 6 operations a weight, and 14 times the queries for each token it attends to:
    attention computes its scores again."""
    work = gpu_updates.Work([5, 5, 7], [3, 2, 4], samples=2)
    one, three = (
        gpu_updates.update_counts(work, THIN | {"num_hidden_layers": n}, "head", packed=packed)
        for n in (1, 3)
    )
    assert one.tokens == three.tokens == tokens
    layer = 36 * 36 * 2 + 2 * 36 * 12 + 3 * 36 * 16  # weights
    of_layer = 6 * layer * tokens + 14 * pairs * 36
    heads = 6 * 3 * 4 * 36 * (64 + 1)  # 3 rows of 4 states, the LM head's and the value head's
    assert one.flops == of_layer + heads
    assert three.flops == 3 * of_layer + heads
    # 7 products, attention and all else of a decoding step's layer, and about twice that backwards
    assert 80 < (three.launches - one.launches) / 2 < 140
    weights = 2 * layer  # bytes
    # each weight is read twice and its gradient is written
    assert three.bytes - one.bytes > 2 * 3 * weights


def test_the_stored_report_has_updates_without_padding_that_compute_less():
    lines = RESULT["updates"]
    assert {line["work"] for line in lines} == set(gpu_updates.WORKS)
    for line in lines:
        for name in ("tokens", "bytes", "flops"):
            assert line["packed"][name] < line["padded"][name]
