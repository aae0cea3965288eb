"""Write docs/gpu_status.md: `python benchmarks/gpu_computed/untested_lines.py`, some minutes.

Tests that reach the code for GPUs run under coverage.py in two processes: an ordinary one, and one
that interprets the Triton kernels (where this module is a plugin that notes which kernels ran).
Lines that neither process executed are listed.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from coverage import Coverage, CoverageData

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "gpu_status.md"
NOTES = "PPO_FAST_INTERPRETED_KERNELS"  # environment variable: where the plugin writes

TESTS = {
    "ordinary": [
        "tests/ops/test_self_check.py",
        "tests/ops/test_no_sync.py",
        "tests/ops/test_logprobs_cpp.py",
        "tests/ops/test_ppo_loss_op.py",
        "tests/diagnostics/test_doctor.py",
        "tests/rollout/test_cuda_graphs.py",
        "tests/rollout/test_kept_graphs.py",
        "tests/cli/test_env.py",
    ],
    "interpreted": ["--triton", "tests/ops"],
}

UNPROVEN = """\
## What remains unproven

All of it ran on one H200 (torch 2.11, Triton 3.6): the tests of the kernels, compute-sanitizer,
decoding with CUDA graphs, whole steps ([gpu_measured.md](gpu_measured.md)). No test of every day
does so: these run in Triton's interpreter, on the compiled code, and on recordings of a step's
operations. What no run has shown:

- **What came after that run.** `ppo_loss` with importance weights, ratios of sequences, "cispo" and
  "mask", and `value_loss(huber=...)`. `offload`: its copies from and to pinned memory. Passes
  without padding: attention of rows of different lengths, by torch or flash-attn.
- **Other GPUs.** The code for sm_80, 86, 89, 100 and 120 is inspected (registers, spills, width of
  loads), never run. `associative_scan(reverse=True)`, reported wrong on GPUs, is not used.
- **Other versions** of torch and Triton on a GPU.
- **Memory.** Page-locked copies, running out; tensors of more than 2^31 elements are addressed in
  the interpreter and checked for overflow, never held.
- **Several GPUs**, in a process or over several processes; launches on other streams than the
  default one and that of a capture.
- **Speed** elsewhere: what benchmarks/README.md says of GPUs is computed.
- **AMD and Intel GPUs.** Not looked at.

On a GPU, `ppo-fast doctor` checks and measures every kernel, `pytest --triton` runs the tests of
the kernels on it, and the first use of each op compares its kernels with the reference once.
"""


class Kernel(NamedTuple):
    name: str
    lines: range


class Found(NamedTuple):
    """The findings of one file."""

    missing: list[str]
    """The first lines of statements that no test executed."""
    elsewhere: list[str]
    """Lines that mention CUDA in a file that is not for GPUs, executed or not."""
    kernels: dict[str, bool]
    """Triton functions, and whether the interpreter ran them."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        datas = [Path(folder) / name for name in TESTS]
        runs = {
            name: start_tests(tests, data, Path(folder) / f"{name}.json")
            for (name, tests), data in zip(TESTS.items(), datas, strict=True)
        }
        failed = [name for name, run in runs.items() if run.wait() != 0]
        interpreted = set(json.loads((Path(folder) / "interpreted.json").read_text()))
        found = find(merged(datas), interpreted)
    DOCUMENT.write_text(document(found), "utf-8")
    if failed:
        sys.exit(f"tests failed ({', '.join(failed)}): lines may be listed that usually run")


def start_tests(tests: list[str], data: Path, notes: Path) -> subprocess.Popen[bytes]:
    coverage = ["-m", "coverage", "run", f"--data-file={data}", "--source=ppo_fast"]
    pytest = ["-m", "pytest", "-q", "-p", "untested_lines", *tests]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    env = os.environ | {NOTES: str(notes), "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, *coverage, *pytest], cwd=ROOT, env=env)


def pytest_sessionfinish() -> None:
    """Write down which functions the interpreter ran; a hook of the plugin."""
    from triton.runtime.interpreter import InterpretedFunction

    names = [f"{fn.__module__}.{fn.__name__}" for fn in InterpretedFunction.rewritten_fn]
    Path(os.environ[NOTES]).write_text(json.dumps(names))


def merged(datas: list[Path]) -> Coverage:
    coverage = Coverage(data_file=None)
    for path in datas:
        data = CoverageData(str(path))
        data.read()
        coverage.get_data().update(data)
    return coverage


def find(coverage: Coverage, interpreted: set[str]) -> dict[str, Found]:
    found = {}
    for path in sorted((ROOT / "ppo_fast").rglob("*.py")):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
        kernels, lines = list(triton_functions(text)), text.splitlines()
        *_, missing, _ = coverage.analysis2(str(path))
        missing = [n for n in missing if not any(n in kernel.lines for kernel in kernels)]
        # Coverage sees a scan's function, which is called as written; others are rewritten first.
        seen = set(coverage.get_data().lines(str(path)) or [])
        module = name.removesuffix(".py").replace("/", ".")
        found[name] = Found(
            [lines[n - 1].strip() for n in missing if is_for_gpus(name)],
            [lines[n - 1].strip() for n in sorted(cuda_lines(path)) if not is_for_gpus(name)],
            {
                kernel.name: f"{module}.{kernel.name}" in interpreted
                or bool(seen & set(kernel.lines))
                for kernel in kernels
            },
        )
    return found


def is_for_gpus(name: str) -> bool:
    """Return whether all of a file is looked at; of other files, lines that mention CUDA are."""
    files = (
        "triton_launch.py",
        "first_use.py",
        "triton_reduce.py",
        "dispatch.py",
        "impls.py",
        "library.py",
        "cuda_graphs.py",
    )
    of_op = name.startswith("ppo_fast/ops/") and Path(name).name.startswith("triton")
    others = ("diagnostics/doctor.py", "diagnostics/env.py", "rollout/speedups/cuda_graph_check.py")
    return of_op or name.endswith(files) or name.removeprefix("ppo_fast/") in others


def triton_functions(text: str) -> Iterator[Kernel]:
    """Yield the Triton functions: compiled or rewritten, so that coverage does not see them run."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            decorators = {ast.unparse(d) for d in node.decorator_list}
            if decorators & {"kernel", "triton.jit"}:
                yield Kernel(node.name, range(node.body[0].lineno, node.end_lineno + 1))


def cuda_lines(path: Path) -> set[int]:
    """Return lines whose code mentions ``cuda`` (not comments), and the bodies of such ifs."""
    with path.open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    found = {token.start[0] for token in tokens if token.string in ("cuda", '"cuda"', "is_cuda")}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.If) and found & set(
            range(node.test.lineno, node.test.end_lineno + 1)
        ):
            found |= {line for s in node.body for line in range(s.lineno, s.end_lineno + 1)}
    return found


def document(found: dict[str, Found]) -> str:
    missing = sum(len(f.missing) for f in found.values())
    ordinary = " ".join(TESTS["ordinary"])
    kernels = [ran for f in found.values() for ran in f.kernels.values()]
    parts = [
        "# What of the GPU code has run, without a GPU\n",
        "Written by `python benchmarks/gpu_computed/untested_lines.py` (coverage.py under two runs "
        "of the tests: "
        f"`pytest {ordinary}`, and `pytest {' '.join(TESTS['interpreted'])}`, where Triton's "
        "interpreter runs the kernels on CPU tensors).\n",
        f"- {sum(kernels)} of {len(kernels)} Triton functions ran in the interpreter, where their "
        "values are checked, and where coverage cannot look into them.",
        f"- {missing} lines of Python in the files for GPUs were executed by neither run.\n",
        "## Lines that neither run executed\n",
        *(block(name, f.missing) for name, f in found.items() if f.missing),
        "## Lines elsewhere that do otherwise on a GPU\n",
        *(block(name, f.elsewhere) for name, f in found.items() if f.elsewhere),
        "## Triton functions\n",
        "| file | run by the interpreter | not run |\n|---|---|---|\n"
        + "".join(row(name, f.kernels) for name, f in found.items() if f.kernels),
        UNPROVEN,
    ]
    return "\n".join(parts)


def block(name: str, lines: list[str]) -> str:
    return f"`{name}`\n\n```text\n" + "\n".join(lines) + "\n```\n"


def row(name: str, kernels: dict[str, bool]) -> str:
    ran, not_run = (
        ", ".join(f"`{kernel}`" for kernel, is_run in kernels.items() if is_run == wanted)
        for wanted in (True, False)
    )
    return f"| `{name}` | {ran} | {not_run} |\n"


if __name__ == "__main__":
    main()
