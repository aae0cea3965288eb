"""The first-use check: compare Triton kernels with the float64 reference, once an installation.

None of our tests has run on a given user's GPU, driver and compiler. So the first use of an op's
Triton kernels under ``impl="auto"`` compares them with the reference, which runs on the CPU, on a
small case: forward and gradients, an odd vocabulary of more than one block, a mask over NaN, a
temperature. The result is stored in the user's cache directory. ``auto`` does not use kernels that
are wrong or raise; an explicit ``impl="triton"`` still does.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import re
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.ops.backends.impls import FOLDERS, Impl
from ppo_fast.ops.backends.side import Side

CHECKED = (
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
"""Ops that have a check.py: a function ``case(side)`` and the dtypes to run it in."""


class Result(NamedTuple):
    """The outcome of one check."""

    error: float
    """Relative error (largest difference over largest number) of the output whose error is the
    largest share of its allowed error. NaN if something raised."""
    ok: bool
    detail: str
    """The error of each output, the largest share of its allowed error first; if not ok, the
    outputs that are wrong, or the exception."""


_known: dict[tuple[str, torch.device], Result] = {}
_one_at_a_time = threading.Lock()


def first_use(op: str, device: torch.device) -> Result:
    """Return the result of the check: whether ``auto`` may use the Triton kernels of ``op``.

    After the first call this is a dict lookup. Warns once if the kernels may not be used. Where the
    check cannot run now (the device of a fake tensor, a CUDA graph that is being captured), the
    kernels are trusted until it can.
    """
    result = _known.get((op, device))
    if result is not None:
        return result
    if not _can_run_on(device):
        return Result(0.0, True, "not checked")
    with _one_at_a_time:
        if (op, device) in _known:
            return _known[op, device]
        result = remembered(op, device)
        if result is None:
            result = check_and_remember(op, device)
        _known[op, device] = result
    if not result.ok:
        warnings.warn(
            f"ppo_fast: {op} uses the slower reference on {device}, because its Triton kernels "
            f"failed the check on first use: {result.detail}. `ppo-fast doctor` repeats the check "
            "and stores the new result.",
            RuntimeWarning,
            stacklevel=6,  # the caller of the op
        )
    return result


def check(op: str, device: torch.device, impl: Impl = "triton") -> Result:
    """Compare ``op`` on ``device`` with the reference in float64, on a small case."""
    # Modes (fake tensors, inference, autocast, a default device) are per thread: a new thread has
    # none.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_check, op, device, impl).result()


def _check(op: str, device: torch.device, impl: Impl) -> Result:
    module = importlib.import_module(f"ppo_fast.ops.{FOLDERS.get(op, op)}.check")
    case, dtypes = module.case, module.DTYPES
    outcomes = []  # error as a share of what is allowed, error, words
    try:
        for dtype in dtypes:
            got = case(Side(impl, device, dtype, dtype))
            want = case(Side("reference", torch.device("cpu"), dtype, torch.float64))
            for name in want:
                error, allowed = _error(got[name], want[name]), _allowed(op, name, dtype)
                words = f"{name} ({str(dtype).removeprefix('torch.')}) {error:.1e}"
                outcomes.append((error / allowed, error, words))
    except Exception as raised:  # whatever a compiler, a driver or a launch may raise
        message = (str(raised).strip().splitlines() or [""])[0]
        return Result(math.nan, False, f"{type(raised).__name__}: {message}")
    outcomes.sort(reverse=True)
    error = outcomes[0][1]
    wrong = [words for share, _, words in outcomes if share > 1]
    if wrong:
        return Result(error, False, f"relative errors: {', '.join(wrong)}")
    return Result(error, True, ", ".join(words for *_, words in outcomes))


def _error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().cpu(), want.detach()
    if got.shape != want.shape:
        return math.inf
    if not want.is_floating_point():
        return (got != want).double().mean().item()
    error = (got.double() - want).abs().max().item()
    largest = want.abs().max().item()
    return math.inf if math.isnan(error) else error / (largest or 1.0)


def _allowed(op: str, name: str, dtype: torch.dtype) -> float:
    """Return the allowed error: about a hundred times the error of correct kernels."""
    of_inputs_dtype = name.startswith("gradient") or op == "decode_attention"
    if of_inputs_dtype and dtype == torch.bfloat16:
        return 1e-2  # stored in bfloat16: half an ulp is 2e-3
    if not name.startswith("gradient"):
        return 1e-4
    return 2e-3 if op == "linear_logprobs" else 1e-4  # its products may run in TF32


# Stored results


def remembered(op: str, device: torch.device) -> Result | None:
    """Return the stored result of a check with this GPU, driver, compiler and kernels, or None."""
    try:
        result = Result(**_read_memory()[installation(device)][op])
    except (KeyError, TypeError):
        return None
    return result if isinstance(result.ok, bool) else None


def check_and_remember(op: str, device: torch.device) -> Result:
    """Run the check, even if a result is stored, and store its result.

    A check that raised is not stored: a missing compiler or full memory may be mended next time.
    """
    result = _known[op, device] = check(op, device)
    if not math.isnan(result.error):
        _remember(op, installation(device), result)
    return result


def memory_path() -> Path:
    """Return the file of stored results, in ``$XDG_CACHE_HOME`` or, if not set, ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ppo_fast" / "self_check.json"


def _read_memory() -> dict[str, Any]:
    try:
        memory = json.loads(memory_path().read_text("utf-8"))
    except (OSError, ValueError, RuntimeError):  # no file; not JSON; no home
        return {}
    return memory if isinstance(memory, dict) else {}


def _remember(op: str, where: str, result: Result) -> None:
    """Store a result. If two processes write at once, one result is lost and its check reruns."""
    memory = _read_memory()
    answers = memory.get(where)
    memory[where] = (answers if isinstance(answers, dict) else {}) | {op: result._asdict()}
    try:
        path = memory_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(memory, file, indent=1)
        os.replace(file.name, path)
    except (OSError, RuntimeError):
        return


def installation(device: torch.device) -> str:
    """Return what a result depends on: GPU, driver, versions of compiler and package, kernels."""
    import triton

    ops = Path(__file__).parents[1]
    sources = sorted([*ops.glob("*.py"), *ops.glob("backends/*.py"), *ops.glob("*/triton*.py")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return (
        f"{torch.cuda.get_device_name(device)}, driver {driver()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, ppo_fast {_own_version()}, kernels {digest[:12]}"
    )


def _own_version() -> str:
    try:
        return importlib.metadata.version("ppo_fast")
    except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
        return "unknown"


def driver() -> str:
    """Return the version of the GPU's driver or, if that is hidden, of the CUDA it supports."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    if found:
        return found[0]
    return f"of CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


def _can_run_on(device: torch.device) -> bool:
    return (
        torch.cuda.is_available()
        and (device.index or 0) < torch.cuda.device_count()
        and not torch.cuda.is_current_stream_capturing()
    )
