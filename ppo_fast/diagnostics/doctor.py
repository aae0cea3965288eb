"""``ppo-fast doctor``: checks the kernels on this machine; on a GPU, measures their speed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_fast import ops
from ppo_fast.diagnostics.env import facts, main_device
from ppo_fast.ops.backends import first_use
from ppo_fast.ops.backends.impls import COMPILED, Impl, missing
from ppo_fast.runs.plain_text import plain, visible

INTERPRETED = {"TRITON_INTERPRET": "1"}


def run_doctor(console: Console, report_to: Path | None, *, interpret: bool = False) -> bool:
    """Check the kernels, print the findings, and write them to ``report_to`` (None: print) as JSON.

    Returns whether all is well.
    """
    in_interpreter = INTERPRETED.items() <= os.environ.items()
    if interpret and not in_interpreter:  # Triton reads the variable when kernels are imported
        return _run_interpreted(report_to)
    device = main_device()
    report: dict[str, Any] = {"facts": facts(device)}
    _print_facts(console, report["facts"])

    report["checks"] = _check_all(console, device, in_interpreter)
    _print_checks(console, report["checks"])
    on_gpu = device.type == "cuda" and not in_interpreter
    if not on_gpu and not in_interpreter:
        console.print(
            "No GPU here: the Triton kernels did not run. --interpret checks their values in "
            "Triton's interpreter, on the CPU."
        )
    if on_gpu and missing("triton") is None and not _is_lost(device):
        with console.status("measuring"):
            report["speeds"] = measure(device, "triton", Sizes(), _median_ms)
        _print_speeds(console, report["speeds"])

    text = json.dumps(report, indent=1, allow_nan=False)
    if report_to is None:
        print(text)
    else:
        report_to.write_text(text + "\n", "utf-8")
        console.print(plain(f"written to {report_to}"))
    return _print_verdict(console, report, in_interpreter)


def _print_verdict(console: Console, report: dict[str, Any], in_interpreter: bool) -> bool:
    """Print a line for each fault; return whether there is none.

    A check that raised is named differently: it says nothing of the kernel's numbers.
    """
    faults = [check for check in report["checks"] if not check["ok"]]
    works = report.get("speeds", {"works": []})["works"]
    lines = [
        ("wrong" if check["ran"] else "could not be run")
        + f": {check['op']}, {check['impl']}: {check['detail']}"
        for check in sorted(faults, key=lambda check: not check["ran"])
    ]
    lines += [
        f"wrong: {work['work']}: {work['error']}" for work in works if not work.get("ok", True)
    ]
    for line in lines:
        console.print(Text(visible(line), "red"))
    if in_interpreter and not all(check["ran"] for check in faults):
        console.print("Triton's interpreter before 3.7 needs numpy below 2.4.")
    if not lines:
        console.print("All checks passed.")
    return not lines


def _run_interpreted(report_to: Path | None) -> bool:
    command = [sys.executable, "-c", "from ppo_fast.cli.main import main; main()", "doctor"]
    if report_to is not None:
        command += ["--json", str(report_to)]
    return subprocess.run(command, env=os.environ | INTERPRETED).returncode == 0


# Values


def _check_all(console: Console, device: torch.device, in_interpreter: bool) -> list[dict]:
    """Check each op's kernels on the devices that they are for."""
    cpu = torch.device("cpu")
    runs: list[tuple[Impl, torch.device]] = [("cpp", cpu)]
    if in_interpreter:
        runs.append(("triton", cpu))
    elif device.type == "cuda":
        runs.append(("triton", device))
    checks = []
    for impl, where in runs:
        for op in (op for op in first_use.CHECKED if impl in COMPILED[op]):
            with console.status(f"checking {op}, {impl}"):
                result = _check(op, impl, where)
            name = "cpu, interpreted" if impl == "triton" and where == cpu else where.type
            error = result.error if math.isfinite(result.error) else str(result.error)
            ran = not math.isnan(result.error)
            found = result._asdict() | {"ran": ran, "error": error}
            checks.append({"op": op, "impl": impl, "on": name, **found})
    return checks


def _check(op: str, impl: Impl, device: torch.device) -> first_use.Result:
    if reason := missing(impl):
        return first_use.Result(math.nan, False, reason)
    if device.type != "cuda":
        return first_use.check(op, device, impl)
    if _is_lost(device):
        return check_in_own_process(op, device)
    return first_use.check_and_remember(op, device)


def _is_lost(device: torch.device) -> bool:
    """Return whether an earlier error, such as an illegal access, ended the use of a GPU.

    Whatever this process launches there from then on fails with that error.
    """
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


def check_in_own_process(op: str, device: torch.device) -> first_use.Result:
    """Run ``check_and_remember`` in a new process."""
    code = (
        "import json, sys, torch\n"
        "from ppo_fast.ops.backends import first_use\n"
        "op, device = sys.argv[1:]\n"
        "print(json.dumps(first_use.check_and_remember(op, torch.device(device))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, op, str(device)], capture_output=True, text=True
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return first_use.Result(math.nan, False, last)
    return first_use.Result(*json.loads(done.stdout.splitlines()[-1]))


# Speed


class Sizes(NamedTuple):
    """Sizes of what is measured; the defaults take 8 GB."""

    rows: int = 4096
    vocab_size: int = 128256
    odd_vocab_size: int = 50257
    """Rows of this size start anywhere between multiples of 16 bytes."""
    hidden_size: int = 2048
    sequences: int = 8192
    steps: int = 2048
    cache: tuple[int, int, int, int] = (32, 2048, 8, 128)
    """Shape of keys, and of values: rows, columns, heads, head size."""
    copied: int = 2**28


class Work(NamedTuple):
    name: str
    run: Callable[[], Any]
    num_bytes: int
    """Bytes that must be read and written."""
    flops: int = 0
    """Floating-point operations of matrix products by the BLAS."""


Bench = Callable[[Callable[[], Any]], float]  # milliseconds


def _median_ms(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return do_bench(run, return_mode="median")


def measure(device: torch.device, impl: Impl, sizes: Sizes, bench: Bench) -> dict[str, Any]:
    """Time the kernels, beside what copying and multiplying at this machine's speed would take."""
    bytes_a_ms = _copied_bytes_a_ms(sizes, device, bench)
    flops_a_ms = _multiplied_flops_a_ms(sizes, device, bench)
    works: list[dict[str, Any]] = []
    for make in WORKS:
        try:
            for work in make(sizes, device, impl):
                ms = bench(work.run)
                floor_ms = work.num_bytes / bytes_a_ms + work.flops / flops_a_ms
                works.append(
                    {
                        "work": work.name,
                        "ms": ms,
                        "gb_s": work.num_bytes / ms / 1e6,
                        "floor_ms": floor_ms,
                        "share_of_floor": floor_ms / ms,
                    }
                )
        except Exception as error:  # whatever a driver or a launch may raise
            message = f"{type(error).__name__}: {error}".split("\n")[0]
            ok = isinstance(error, torch.OutOfMemoryError)  # other works can still be measured
            works.append({"work": make.__name__.strip("_"), "ok": ok, "error": message})
    return {"copy_gb_s": bytes_a_ms / 1e6, "product_tflop_s": flops_a_ms / 1e9, "works": works}


def _copied_bytes_a_ms(sizes: Sizes, device: torch.device, bench: Bench) -> float:
    """Measure the bytes of a copy per millisecond, those read and those written together."""
    source = torch.empty(sizes.copied, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / bench(lambda: target.copy_(source))


def _multiplied_flops_a_ms(sizes: Sizes, device: torch.device, bench: Bench) -> float:
    n, v, d = sizes.rows, sizes.vocab_size, sizes.hidden_size
    left = torch.randn(n, d, device=device).bfloat16()
    right = torch.randn(v, d, device=device).bfloat16()
    return 2 * n * v * d / bench(lambda: left @ right.T)


def _logprobs_from_logits(sizes: Sizes, device: torch.device, impl: Impl) -> Iterator[Work]:
    for vocab_size in (sizes.vocab_size, sizes.odd_vocab_size):
        yield from _logprobs_at(vocab_size, sizes.rows, device, impl)


def _logprobs_at(v: int, n: int, device: torch.device, impl: Impl) -> Iterator[Work]:
    logits = torch.randn(n, v, device=device, dtype=torch.bfloat16).requires_grad_()
    labels, upstream = torch.randint(v, (n,), device=device), torch.randn(2, n, device=device)
    yield Work(
        f"logprobs_from_logits forward, {n} x {v}, bfloat16",
        lambda: ops.logprobs_from_logits(logits.detach(), labels, impl=impl),
        logits.nbytes,
    )
    logprobs, entropy = ops.logprobs_from_logits(logits, labels, impl=impl)
    assert entropy is not None

    def backward() -> None:
        torch.autograd.grad([logprobs, entropy], logits, list(upstream), retain_graph=True)

    yield Work(f"logprobs_from_logits backward, {n} x {v}, bfloat16", backward, 2 * logits.nbytes)


def _linear_logprobs(sizes: Sizes, device: torch.device, impl: Impl) -> Iterator[Work]:
    n, v, d = sizes.rows, sizes.vocab_size, sizes.hidden_size
    hidden = torch.randn(n, d, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(v, d, device=device) / d**0.5).bfloat16().requires_grad_()
    labels = torch.randint(v, (n,), device=device)

    def run() -> None:
        out = ops.linear_logprobs(hidden, weight, labels, impl=impl)
        torch.autograd.grad(out.logprobs.sum(), [hidden, weight])

    # Four products: the fourth computes again the logits that did not fit the budget.
    yield Work(
        f"linear_logprobs forward and backward, {n} x {v} x {d}, bfloat16",
        run,
        2 * (hidden.nbytes + weight.nbytes),
        4 * 2 * n * v * d,
    )


def _token_ops(sizes: Sizes, device: torch.device, impl: Impl) -> Iterator[Work]:
    shape, tokens = (sizes.sequences, sizes.steps), sizes.sequences * sizes.steps
    words = f"{sizes.sequences} x {sizes.steps}, float32"
    x, old, ref, advantages = (torch.randn(shape, device=device) for _ in range(4))
    mask = torch.rand(shape, device=device) < 0.8
    yield Work(
        f"gae, {words}",
        lambda: ops.gae(x, old, mask=mask, gamma=0.99, lam=0.95, impl=impl),
        17 * tokens,
    )
    yield Work(
        f"kl_estimate, {words}",
        lambda: ops.kl_estimate(x, ref, mask=mask, estimator="k3", impl=impl),
        13 * tokens,
    )
    yield Work(f"whiten, {words}", lambda: ops.whiten(x, mask=mask, impl=impl), 9 * tokens)
    y = x.clone().requires_grad_()
    yield Work(
        f"ppo_loss with its gradient, {words}",
        lambda: ops.ppo_loss(
            y,
            old_logprobs=old,
            advantages=advantages,
            ref_logprobs=ref,
            mask=mask,
            kl_coef=0.1,
            impl=impl,
        ),
        21 * tokens,
    )
    yield Work(
        f"value_loss with its gradient, {words}",
        lambda: ops.value_loss(y, old_values=old, returns=ref, mask=mask, clip=0.2, impl=impl),
        17 * tokens,
    )


def _sample_tokens(sizes: Sizes, device: torch.device, impl: Impl) -> Iterator[Work]:
    shape = max(sizes.rows // 16, 1), sizes.vocab_size
    logits = torch.randn(shape, device=device, dtype=torch.bfloat16)
    seeds = torch.arange(shape[0], device=device)
    yield Work(
        f"sample_tokens, {shape[0]} x {shape[1]}, bfloat16",
        lambda: ops.sample_tokens(logits, seeds, seeds, impl=impl),
        logits.nbytes,
    )


def _decode_attention(sizes: Sizes, device: torch.device, impl: Impl) -> Iterator[Work]:
    rows, columns, kv_heads, head_size = sizes.cache
    heads = 4 * kv_heads
    keys, values = torch.randn(2, *sizes.cache, device=device, dtype=torch.bfloat16)
    query = torch.randn(rows, heads, head_size, device=device, dtype=torch.bfloat16)
    for seen in (columns, max(columns // 8, 1)):
        lengths = torch.full((rows,), seen, device=device)
        yield Work(
            f"decode_attention, {rows} x {seen} of {columns}, {heads} heads of {head_size} "
            f"on {kv_heads}, bfloat16",
            partial(ops.decode_attention, query, keys, values, lengths, scaling=0.1, impl=impl),
            2 * keys[:, :seen].nbytes,
        )


WORKS = (_logprobs_from_logits, _linear_logprobs, _token_ops, _sample_tokens, _decode_attention)


# Tables


def _print_facts(console: Console, found: dict[str, str]) -> None:
    table = Table("what", "found", title="ppo_fast doctor")
    for row in found.items():
        table.add_row(*map(plain, row))
    console.print(table)


def _print_checks(console: Console, checks: list[dict]) -> None:
    table = Table("op", "kernels", "on", "found", "largest error", title="against float64")
    for check in checks:
        found = Text("wrong" if check["ran"] else "not run", "red")
        if check["ok"]:
            found = Text("right", "green")
        worst = check["detail"].partition(", ")[0] if check["ok"] else "see below"
        table.add_row(check["op"], check["impl"], check["on"], found, plain(worst))
    console.print(table)


def _print_speeds(console: Console, speeds: dict[str, Any]) -> None:
    title = (
        f"speed; copying {speeds['copy_gb_s']:.0f} GB/s, "
        f"products {speeds['product_tflop_s']:.0f} TFLOP/s (bfloat16)"
    )
    table = Table("work", "ms", "GB/s", "floor / time", title=title)
    for work in speeds["works"]:
        if "error" in work:
            table.add_row(work["work"], "not measured", "", plain(work["error"]))
        else:
            numbers = f"{work['ms']:.3f}", f"{work['gb_s']:.0f}", f"{work['share_of_floor']:.0%}"
            table.add_row(work["work"], *numbers)
    console.print(table)
