"""The kernels compiled without OpenMP: they build, and compute the same bits."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"

# Prints the results of two kernels that share rows out over threads, exactly.
DRIVER = r"""
#include <cstdio>
#include <vector>
#include "kernels.hpp"

using namespace ppo_fast;

void print(const std::vector<float>& numbers) {
  for (float x : numbers) std::printf("%a\n", x);
}

int main() {
  const std::int64_t rows = 40, columns = 5003;
  std::uint32_t state = 1;
  std::vector<float> x(rows * columns), y(rows * columns);
  for (auto* numbers : {&x, &y}) {
    for (float& number : *numbers) {
      state = state * 1664525u + 1013904223u;
      number = static_cast<float>(state >> 8) / (1 << 22) - 2.0f;
    }
  }
  std::vector<std::int64_t> labels(rows, 7);
  std::vector<float> logprobs(rows), entropy(rows), stats(2 * rows);
  kernels_baseline.logprobs_forward(
      {{Dtype::float32, x.data(), columns, 1, 0, rows, columns}, labels.data(), nullptr, 0.7, true,
       logprobs.data(), entropy.data(), stats.data()}, 2);
  print(logprobs), print(entropy), print(stats);

  std::vector<float> zero(rows), lam(rows, 0.95f), advantages(x.size()), returns(x.size());
  kernels_baseline.gae({Dtype::float32, x.data(), y.data(), nullptr, nullptr, zero.data(),
                        lam.data(), 0.99, advantages.data(), returns.data(), rows, columns}, 2);
  print(advantages), print(returns);
}
"""


@pytest.mark.slow
def test_same_bits_without_openmp(tmp_path):
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    (tmp_path / "driver.cpp").write_text(DRIVER)
    sources = [str(tmp_path / "driver.cpp"), str(CSRC / "kernels.cpp")]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", f"-I{CSRC}", "-DPPO_FAST_ISA=baseline"]
    programs = {"with": ["-fopenmp"], "without": []}
    compiling = [
        subprocess.Popen(
            [compiler, *flags, *more, *sources, "-o", str(tmp_path / name)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, more in programs.items()
    ]
    for process in compiling:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    printed = {
        name: subprocess.run([str(tmp_path / name)], capture_output=True, check=True).stdout
        for name in programs
    }
    assert printed["without"] == printed["with"]
    numbers = [float.fromhex(line) for line in printed["without"].decode().split()]
    assert len(numbers) == 40 * (4 + 2 * 5003)
    assert all(-13 < logprob < -6 for logprob in numbers[:40])  # near -log 5003 = -8.5
    assert all(7 < entropy <= 8.52 for entropy in numbers[40:80])
