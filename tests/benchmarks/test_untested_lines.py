"""docs/gpu_status.md, which benchmarks/gpu_computed/untested_lines.py writes, fits the source."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import untested_lines

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "gpu_status.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n?)*)", DOCUMENT, re.MULTILINE))
MISSING, ELSEWHERE, KERNELS, UNPROVEN = SECTIONS


def listed(title):
    blocks = re.findall(
        r"^`([^`\n]*)`\n\n```text\n(.*?)```", SECTIONS[title], re.DOTALL | re.MULTILINE
    )
    return {name: lines.splitlines() for name, lines in blocks}


@pytest.mark.parametrize("title", [MISSING, ELSEWHERE])
def test_every_line_is_still_there(title):
    for name, lines in listed(title).items():
        source = {line.strip() for line in (ROOT / name).read_text("utf-8").splitlines()}
        assert set(lines) <= source, name


def test_few_lines_never_ran():
    number = sum(map(len, listed(MISSING).values()))
    assert f"\n- {number} lines of Python" in DOCUMENT
    assert number < 150


def test_every_line_elsewhere_that_mentions_cuda_is_listed():
    for path in (ROOT / "ppo_fast").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if not untested_lines.is_for_gpus(name):
            lines = path.read_text("utf-8").splitlines()
            spoken = [lines[n - 1].strip() for n in sorted(untested_lines.cuda_lines(path))]
            assert spoken == listed(ELSEWHERE).get(name, [])


def test_every_triton_function_ran_in_the_interpreter():
    rows = re.findall(r"^\| `(.*?)` \| (.*?) \| (.*?) \|$", SECTIONS[KERNELS], re.MULTILINE)
    ran = {name: set(re.findall(r"`(\w+)`", kernels)) for name, kernels, _ in rows}
    for path in (ROOT / "ppo_fast").rglob("*.py"):
        kernels = {k.name for k in untested_lines.triton_functions(path.read_text("utf-8"))}
        assert ran.get(path.relative_to(ROOT).as_posix(), set()) == kernels


def test_the_document_lists_what_is_unproven():
    assert untested_lines.UNPROVEN in DOCUMENT


def test_how_lines_are_found(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        textwrap.dedent(
            '''
            """Says cuda."""
            import triton

            def f(x):
                if x.device.type == "cuda":  # cuda
                    y = 1
                    return y
                return "a word of cuda"

            @triton.jit
            def double(x):
                return 2 * x
            '''
        )
    )
    lines = path.read_text().splitlines()
    assert [lines[n - 1].strip() for n in sorted(untested_lines.cuda_lines(path))] == [
        'if x.device.type == "cuda":  # cuda',
        "y = 1",
        "return y",
    ]
    (kernel,) = untested_lines.triton_functions(path.read_text())
    assert kernel.name == "double"
    assert [lines[n - 1].strip() for n in kernel.lines] == ["return 2 * x"]
