"""The thread pool of the C++ kernels, in separate C++ programs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"

HEAD = r"""
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
#include "base/parallel.hpp"

using namespace ppo_fast;
using namespace ppo_fast::PPO_FAST_ISA;

void expect(bool held, const char* what) {
  if (!held) std::fprintf(stderr, "not so: %s\n", what), std::_Exit(1);
}

// Three loops, each of which needs all of the one before it: what they come to.
double chained(int threads, std::int64_t count) {
  std::vector<double> a(count), b(count), c(count);
  run_loops(threads,
      Loop{count, 3, [&](std::int64_t i) { a[i] = 1.0 / (1 + i); }},
      Loop{count, kShare, [&](std::int64_t i) { b[i] = a[i] - a[count - 1 - i] / 3; }},
      Loop{count, 2, [&](std::int64_t i) { c[i] = b[i] * b[(i * 7) % count]; }});
  double sum = 0;
  for (double x : c) sum = sum / 2 + x;
  return sum;
}
"""

MANY_CALLERS = r"""
int main() {
  std::vector<double> expected;
  for (std::int64_t count = 1; count < 60; ++count) expected.push_back(chained(1, count));
  const auto call = [&] {
    for (int round = 0; round < 20; ++round) {
      for (std::int64_t count = 1; count < 60; ++count) {
        expect(chained(1 + round % 5, count) == expected[count - 1], "the same bits");
      }
    }
  };
  std::thread one(call), two(call);
  call();
  one.join(), two.join();
  run_loops(3, Loop{std::int64_t(0), 1, [](std::int64_t) { std::abort(); }});
}
"""

A_SLOW_THREAD = r"""
int main() {
  std::atomic<int> begun{0}, ended{0};
  const auto slow = [&](std::int64_t i) {
    ++begun;
    while (begun < 2) std::this_thread::yield();  // in two threads
    for (int turn = 0; i == 1 && turn < 1000; ++turn) std::this_thread::yield();
    ++ended;
  };
  const auto after = [&](std::int64_t) { expect(ended == 2, "the loop before has ended"); };
  run_loops(2, Loop{std::int64_t(2), 1, slow}, Loop{std::int64_t(2), 1, after});
}
"""

A_STUCK_THREAD = r"""
int main() {
  std::atomic<int> begun{0};
  std::atomic<bool> released{false};
  std::thread other([&] {
    run_loops(2, Loop{std::int64_t(2), 1, [&](std::int64_t) {
      ++begun;
      while (!released) std::this_thread::yield();
    }});
  });
  while (begun < 2) std::this_thread::yield();
  expect(chained(2, 50) == chained(1, 50), "no need of the thread that has not come back");
  released = true;
  other.join();
}
"""

FORKED = r"""
#include <sys/wait.h>
#include <unistd.h>
int main() {
  const double expected = chained(3, 50);
  const pid_t child = fork();
  if (child == 0) {
    for (int i = 0; i < 100; ++i) expect(chained(3, 50) == expected, "a fork's own threads");
    // two items that each wait for the other to begin: two threads
    std::atomic<int> begun{0};
    run_loops(2, Loop{std::int64_t(2), 1, [&](std::int64_t) {
      ++begun;
      while (begun < 2) std::this_thread::yield();
    }});
    std::_Exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  return status;
}
"""

# The results of two kernels do not depend on the number of threads.
TWO_KERNELS = r"""
#include "kernels.hpp"

std::vector<float> results(int threads) {
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
  std::vector<float> all(4 * rows + 2 * x.size()), zero(rows), lam(rows, 0.95f);
  float* logprobs = all.data();
  kernels_baseline.logprobs_forward(
      {{Dtype::float32, x.data(), columns, 1, 0, rows, columns}, labels.data(), nullptr, 0.7, true,
       logprobs, logprobs + rows, logprobs + 2 * rows}, threads);
  float* advantages = logprobs + 4 * rows;
  kernels_baseline.gae({Dtype::float32, x.data(), y.data(), nullptr, nullptr, zero.data(),
                        lam.data(), 0.99, advantages, advantages + x.size(), rows, columns},
                       threads);
  return all;
}

int main() {
  const std::vector<float> expected = results(1);
  for (int row = 0; row < 40; ++row) {  // near -log 5003 = -8.5
    expect(-13 < expected[row] && expected[row] < -6, "log-probs");
  }
  for (int threads : {2, 3, 7}) expect(results(threads) == expected, "the same bits");
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return run(program, *options), which compiles and runs a program; any output is an error."""
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("threads")

    def run(program: str, *more: str) -> None:
        (folder / "program.cpp").write_text(HEAD + program)
        sources = [str(folder / "program.cpp"), str(CSRC / "base" / "threads.cpp")]
        flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-pthread", f"-I{CSRC}"]
        command = [compiler, *flags, "-DPPO_FAST_ISA=baseline", *sources, *more]
        for step in ([*command, "-o", str(folder / "program")], [str(folder / "program")]):
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), done.stderr

    return run


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", [[], ["-fsanitize=thread"]], ids=["plain", "tsan"])
def test_same_results_for_any_number_of_callers_and_threads(run, sanitizer):
    run(MANY_CALLERS, *sanitizer)


@pytest.mark.slow
def test_a_loop_begins_when_the_one_before_it_has_ended(run):
    run(A_SLOW_THREAD)


@pytest.mark.slow
def test_a_loop_does_not_wait_for_a_thread_that_is_busy_elsewhere(run):
    run(A_STUCK_THREAD)


@pytest.mark.slow
def test_a_forked_process_has_threads_of_its_own(run):
    run(FORKED)


@pytest.mark.slow
def test_kernels_give_the_same_bits_on_any_number_of_threads(run):
    run(TWO_KERNELS, str(CSRC / "kernels.cpp"), "-ffp-contract=off", "-fopenmp-simd")


def libraries():
    """Return the memory map of this process, which has loaded torch; "" outside of Linux."""
    maps = Path("/proc/self/maps")
    return maps.read_text() if maps.exists() else ""


@pytest.mark.slow
@pytest.mark.skipif("libgomp" not in libraries(), reason="the variable is libgomp's alone")
def test_openmp_spins_briefly_where_the_package_is_imported_before_torch():
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", "import ppo_fast, torch"]
    environment |= {"OMP_DISPLAY_ENV": "verbose"}  # libgomp prints its settings when it is loaded
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)) == {"4000"}
