"""Run all checks and measurements that need a GPU, in stages.

python benchmarks/on_gpu/run.py [--seconds=420] [--stages=facts,doctor,...] [--out=DIR] [--cpu]

Needs the dependencies of the package and pytest, but no network. Each stage is a process with its
own time limit, the most informative first; one that fails or hangs does not stop the others. DIR
gets results.jsonl (a line a finding), log.txt, doctor.json, junit.xml and ncu.txt; the findings are
printed last, a short line each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import summary

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PYTHON = sys.executable
OPS = (
    "logprobs_from_logits",
    "linear_logprobs",
    "gae",
    "kl_estimate",
    "ppo_loss",
    "value_loss",
    "whiten",
    "sample_tokens",
    "decode_attention",
)
STAGES = ("facts", "doctor", "attention", "decoding", "step", "tests", "kernels", "ncu")
TIMEOUT = 124

DOCTOR = """
import sys
from pathlib import Path
from rich.console import Console
from ppo_fast.diagnostics.doctor import run_doctor
sys.exit(not run_doctor(Console(width=150), Path(sys.argv[1])))
"""
NCU = [
    "ncu",
    "--clock-control=none",
    "--target-processes=all",
    "--launch-count=6",
    "--kernel-name=regex:logprobs_forward_kernel|logprobs_backward_kernel|gae_kernel|ppo_loss_kernel",
    *(f"--section={name}" for name in ("SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis")),
]


@dataclass
class Run:
    """The output folder of a run, its time limit, and the time left."""

    out: Path
    seconds: float
    cpu: bool
    started: float = field(default_factory=time.monotonic)
    work: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="on_gpu_")))

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    @property
    def environment(self) -> dict[str, str]:
        folders = (
            "tests/helpers",
            *(f"benchmarks{name}" for name in ("", "/ops", "/steps", "/gpu_computed")),
        )
        places = [ROOT, *(ROOT / folder for folder in folders), HERE]
        caches = {
            name: str(self.work / name)
            for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        }
        return os.environ | {
            "PYTHONPATH": os.pathsep.join([*map(str, places), os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "ON_GPU_RESULTS": str(self.results.resolve()),
            "COLUMNS": "150",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            **caches,
        }

    def note(self, stage: str, **found: object) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps({"stage": stage, **found}, default=str) + "\n")

    def start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.work / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=self.environment
            )

    def stage(self, name: str, most: float, command: list[str]) -> int:
        """Run ``command`` for at most ``most`` seconds, or the time left; return its exit code."""
        limit = min(most, self.left())
        if limit < 8:
            self.note("run", name=name, skipped="no time left")
            return TIMEOUT
        began = time.monotonic()
        process = self.start(name, command)
        code = self.finish(process, limit)
        took = round(time.monotonic() - began, 1)
        self.note("run", name=name, rc=code, seconds=took)
        print(f"{name}: rc {code}, {took} s, {self.left():.0f} s left", flush=True)
        self.keep_log(name)
        return code

    @staticmethod
    def finish(process: subprocess.Popen[bytes], limit: float) -> int:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return TIMEOUT

    def keep_log(self, name: str) -> None:
        text = (self.work / f"{name}.log").read_text(errors="replace")[-60000:]
        with (self.out / "log.txt").open("a") as file:
            file.write(f"=================== {name}\n{text}\n")

    def script(self, name: str, *options: str) -> list[str]:
        return [PYTHON, str(HERE / f"{name}.py"), *options, *(["--cpu"] if self.cpu else [])]


def build(run: Run) -> None:
    """Build the C++ extension beside the sources, unless it is there or installed."""
    there = [PYTHON, "-c", "import ppo_fast.ops._C"]
    if subprocess.run(there, cwd=ROOT, env=run.environment, capture_output=True).returncode == 0:
        return
    wheels = run.work / "wheels"
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-q", "-w", str(wheels)]
    if run.stage("build", 120, [PYTHON, "-m", "pip", "wheel", *options, "."]) == 0:
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            built = [name for name in wheel.namelist() if name.startswith("ppo_fast/ops/_C.")]
            wheel.extractall(ROOT, built)


def doctor(run: Run) -> None:
    run.stage("doctor", 90, [PYTHON, "-c", DOCTOR, str((run.out / "doctor.json").resolve())])
    report = run.out / "doctor.json"
    found = json.loads(report.read_text()) if report.exists() else {}
    for check in found.get("checks", []):
        run.note("doctor: check", **check)
    for speed in found.get("speeds", {}).get("works", []):
        run.note("doctor: speed", **speed)
    log = (run.work / "doctor.log").read_text(errors="replace")
    if any(words in log for words in ("illegal memory", "device-side assert", "CUDA error")):
        # such an error ends the process, so each op is checked in its own
        for op in OPS:
            run.stage(f"check_{op}", 25, run.script("small_ops", "check", op))


def tests(run: Run, select: list[str], *, compile_kernels: bool) -> None:
    """Run the kernels' tests and, at the same time, the sanitizers and a compilation.

    They may run together since none of them is timed. The compilation is of what the stage
    "kernels" needs.
    """
    beside = {}
    if not run.cpu and shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            beside[tool] = ["compute-sanitizer", "--tool", tool, "--print-limit", "20"]
            beside[tool] += run.script("small_ops", "examples")
    if compile_kernels and not run.cpu:
        beside["compile"] = run.script("time_ops", "--compile-only", "--budget=100")
    processes = {name: run.start(name, command) for name, command in beside.items()}
    # warnings of another version of a library must not fail the tests
    options = ["-q", "-W", "default", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    options += ["--timeout=100", "--maxfail=200"]
    workers = ["-n", str(min(10, os.cpu_count() or 1)), "--dist=worksteal"]
    has_xdist = subprocess.run([PYTHON, "-c", "import xdist"], capture_output=True).returncode == 0
    options += workers if has_xdist else []
    junit = f"--junitxml={(run.out / 'junit.xml').resolve()}"
    which = select or ["tests/ops"]
    run.stage("tests", 110, [PYTHON, "-m", "pytest", "--triton", *which, *options, junit])
    if (run.out / "junit.xml").exists():
        cases, failures = summary.read_tests(run.out / "junit.xml")
        run.note("tests", run=cases, failed=sum(map(len, failures.values())))
    for name, process in processes.items():
        run.finish(process, max(run.left() - 10, 1))
        run.keep_log(name)
        log = (run.work / f"{name}.log").read_text(errors="replace").splitlines()
        run.note(name, found=[line.strip("= ") for line in log if "SUMMARY" in line][-1:])


def ncu(run: Run) -> None:
    if run.cpu or not shutil.which("ncu"):
        run.note("ncu", skipped="not installed")
        return
    for work in ("logprobs", "tokens"):
        run.stage(f"ncu_{work}", 35, [*NCU, *run.script("small_ops", "big", work)])
        with (run.out / "ncu.txt").open("ab") as file:
            file.write((run.work / f"ncu_{work}.log").read_bytes())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    arguments.add_argument("--seconds", type=float, default=420, help="for all of it")
    arguments.add_argument("--stages", default=",".join(STAGES))
    arguments.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_out")))
    arguments.add_argument("--tests", default="", help="what pytest shall run, instead of all")
    arguments.add_argument("--cpu", action="store_true", help="a dry run, on tiny sizes")
    asked = arguments.parse_args()
    if unknown := set(asked.stages.split(",")) - set(STAGES):
        arguments.error(f"--stages: got {', '.join(unknown)}, expected some of {','.join(STAGES)}")
    asked.out.mkdir(parents=True, exist_ok=True)
    run, wanted = Run(asked.out, asked.seconds, asked.cpu), asked.stages.split(",")
    build(run)
    stages = {
        "facts": lambda: run.stage("facts", 45, run.script("facts")),
        "doctor": lambda: doctor(run),
        "attention": lambda: run.stage("attention", 40, run.script("attention")),
        "decoding": lambda: run.stage("decoding", 85, run.script("decoding")),
        "step": lambda: run.stage("step", 60, run.script("step")),
        "tests": lambda: tests(run, asked.tests.split(), compile_kernels="kernels" in wanted),
        "kernels": lambda: run.stage(
            "kernels", 60, run.script("time_ops", f"--budget={max(min(55, run.left() - 6), 1):.0f}")
        ),
        "ncu": lambda: ncu(run),
    }
    for name in wanted:
        stages[name]()
    print("\n".join(summary.lines(run.results, run.out / "junit.xml")))
    print(f"{time.monotonic() - run.started:.0f} s in all")


if __name__ == "__main__":
    main()
