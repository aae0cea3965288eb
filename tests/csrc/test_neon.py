"""The C++ kernels cross-compiled for 64-bit ARM with NEON."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILERS = [["aarch64-linux-gnu-g++"], ["clang++", "--target=aarch64-linux-gnu"]]
# As in csrc/bindings/CMakeLists.txt.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fopenmp-simd"]
# Functions whose loops over the vocabulary take most of the time.
HOT = ["logprobs_row", "logprobs_backward_row", "fold_row", "tile_gradient_row"]


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    """Return the instructions of each function, by its mangled name."""
    compiler = _cross_compiler(tmp_path_factory.mktemp("probe"))
    out = tmp_path_factory.mktemp("neon") / "kernels.s"
    options = [*FLAGS, "-Wall", "-Wextra", "-DPPO_FAST_ISA=baseline", "-S"]
    _run([*compiler, *options, f"-I{CSRC}", str(CSRC / "kernels.cpp"), "-o", str(out)])
    functions = re.split(r"^(_Z\w+):", out.read_text(), flags=re.MULTILINE)
    return dict(zip(functions[1::2], functions[2::2], strict=True))


@pytest.mark.parametrize("kernel", HOT)
def test_loops_over_the_vocabulary_become_neon(assembly, kernel):
    (body,) = (text for name, text in assembly.items() if f"{len(kernel)}{kernel}IfE" in name)
    fused = re.findall(r"\bfmla\s+v\d+\.4s", body)
    assert len(fused) >= 5, f"{kernel}<float>: {len(fused)} fused products of four numbers"
    calls = re.findall(r"\bbl\s+(?:expf|logf|fmaf)\b", body)
    assert not calls, f"{kernel}<float> calls {calls} for a number at a time"


def _cross_compiler(folder: Path) -> list[str]:
    probe = folder / "probe.cpp"
    probe.write_text("#include <vector>\nstd::vector<int> numbers;\n")
    for compiler in COMPILERS:
        if shutil.which(compiler[0]):
            command = [*compiler, "-c", str(probe), "-o", str(folder / "probe.o")]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return compiler
    names = " nor ".join(" ".join(compiler) for compiler in COMPILERS)
    pytest.skip(f"NEON IS NOT CHECKED HERE: neither {names} is there and works")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"warnings:\n{done.stderr}"
