"""Time the works of benchmarks/on_gpu/gpu_sides.py briefly, the most informative first.

python benchmarks/on_gpu/time_ops.py [--budget=60] [--works='a;b'] [--compile-only] [--cpu]
"""

from __future__ import annotations

import time
from collections.abc import Callable

import gpu_sides
import torch
from common import DEVICE, ON_GPU, STARTED, attempt, note, parser, seconds, synchronize

# Sides that launch hundreds of kernels a call.
SLOW = ("Python loop over T with mask: the reference",)
WORKS = (
    "logprobs forward",
    "logprobs forward and backward",
    "linear, with entropy",
    "linear, log-prob alone",
    "gae, 8192 x 2048",
    "losses",
    "sample",
    "linear, frozen head",
    "gae, 64 x 1024",
)
TINY = {
    "logprobs forward": lambda: gpu_sides.logprobs(8, 96, backward=False, impl="reference"),
    "losses": lambda: gpu_sides.losses(4, 16, impl="reference"),
}


def timed(side: Callable[[], object]) -> tuple[float, float]:
    """Return median milliseconds, and peak megabytes beyond those in use before."""
    side()
    if not ON_GPU:
        return 1e3 * seconds(side)[0], 0.0
    from triton.testing import do_bench

    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side()
    synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return do_bench(side, warmup=10, rep=50, return_mode="median"), peak


def copy_rate() -> float:
    """Measure the bytes a millisecond of a copy, read and written."""
    source = torch.randint(255, (2**30,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / timed(lambda: target.copy_(source))[0]
    note("kernels: copy", gb_s=rate / 1e6)
    return rate


def measure(work: gpu_sides.GpuWork, title: str, copied: float, *, compile_only: bool) -> None:
    side = work.sides[title]
    if isinstance(side, str) or (not ON_GPU and "torch.compile" in title):  # a minute on a CPU
        return
    try:
        if compile_only:
            note("kernels: compiled", work=work.work, side=title, seconds=seconds(side)[0])
            return
        ms, megabytes = timed(side)
        rate = {"gb_s": work.bytes / ms / 1e6, "of_copy": work.bytes / ms / copied}
        note(
            "kernels",
            work=work.work,
            side=title,
            ms=round(ms, 4),
            megabytes=round(megabytes),
            **(rate if work.bytes else {}),
        )
    except Exception as error:  # another's side, or ours out of memory
        note("kernels", work=work.work, side=title, error=f"{type(error).__name__}: {error}"[:200])


def main() -> None:
    works = gpu_sides.WORKS if ON_GPU else TINY
    arguments = parser()
    arguments.add_argument("--budget", type=float, default=60, help="seconds")
    arguments.add_argument("--works", default=";".join(WORKS if ON_GPU else works))
    arguments.add_argument("--compile-only", action="store_true", help="for the compilers' caches")
    asked = arguments.parse_args()

    def time_is_left() -> bool:
        return time.perf_counter() - STARTED < asked.budget

    copied = copy_rate() if ON_GPU else 1.0
    for name in asked.works.split(";"):
        if not time_is_left():
            note("kernels", work=name, skipped="no time left")
            continue
        with attempt(f"kernels: {name}"):
            torch._dynamo.reset()
            with DEVICE:
                torch.manual_seed(0)
                work = works[name]()
            for title in work.sides:
                if title not in SLOW and time_is_left():
                    measure(work, title, copied, compile_only=asked.compile_only)
                    if ON_GPU:
                        torch.cuda.empty_cache()
            del work


if __name__ == "__main__":
    main()
