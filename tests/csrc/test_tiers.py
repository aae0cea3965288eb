"""The instructions that the kernels of each instruction set are compiled to."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = shutil.which("c++")
# As in csrc/bindings/CMakeLists.txt.
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
FLAGS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
# What is there, and what is not.
EXPECTED = {
    "baseline": (r"\bmulps\b", r"%[yz]mm|\bvfmadd"),
    "avx2": (r"\bvfmadd\w+ps\b.*%ymm", r"%zmm|%k1"),
    "avx512": (r"\bvfmadd\w+ps\b.*%zmm", r"\bv(dpbf16|cvtne2?ps2bf16)"),
    "avx512_bf16": (r"\bvdpbf16ps\b.*%zmm", r"\bvdpbf16ps\b.*%[xy]mm"),
}
# Weights in int8 are widened in registers.
WIDENED = {"avx2": r"\bvpmovsxbd\b.*%ymm", "avx512": r"\bvpmovsxbd\b.*%zmm"}
SOURCE = """
#include "kernels/few_row_linear.hpp"
void product(const ppo_fast::FewRowLinearArgs& args) {
  ppo_fast::PPO_FAST_ISA::few_row_products<float, ppo_fast::BFloat16>(args, 1);
}
void product_in_int8(const ppo_fast::FewRowLinearArgs& args) {
  ppo_fast::PPO_FAST_ISA::few_row_products<float, ppo_fast::Int8>(args, 1);
}
"""


@pytest.mark.parametrize("isa", FLAGS)
def test_products_use_what_their_instruction_set_has_and_nothing_more(isa, tmp_path):
    if COMPILER is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("INSTRUCTIONS ARE NOT CHECKED HERE: no C++ compiler (c++) for x86-64")
    (tmp_path / "product.cpp").write_text(SOURCE)
    command = [COMPILER, "-std=c++17", "-O2", f"-I{CSRC}", f"-DPPO_FAST_ISA={isa}", *FLAGS[isa]]
    command += ["-S", str(tmp_path / "product.cpp"), "-o", str(tmp_path / "product.s")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized" in done.stderr or "unknown argument" in done.stderr:
        pytest.skip(f"INSTRUCTIONS ARE NOT CHECKED HERE: the compiler does not know {isa}")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "product.s").read_text()
    there, absent = EXPECTED[isa]
    for pattern in (there, WIDENED.get(isa, there)):
        assert re.search(pattern, text), f"{isa}: no {pattern}"
    assert not re.search(absent, text), f"{isa}: {re.search(absent, text)}"
