"""The check of first use: Triton kernels against the float64 reference, once an installation.

No test of ours has seen a given user's GPU, driver and compiler. So the first use of an op's Triton
kernels under ``impl="auto"`` compares them with the reference, which runs on the CPU, on a small
case: forward and gradients, an odd vocabulary of more than one block, a mask over NaN, a
temperature. The answer is remembered in the user's cache directory. Kernels that are wrong, or
raise, are not used by ``auto``; an explicit ``impl="triton"`` is not stopped.
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
"""Ops with a check.py: a function ``case(side)`` and the dtypes that it is run in."""


class Result(NamedTuple):
    """Of one check."""

    error: float
    """Largest difference, relative to the largest number of that output: of the output that comes
    nearest to what is allowed, or goes furthest beyond. NaN if something raised."""
    ok: bool
    detail: str
    """Each output's error, in the order of what is left of the allowed; if not ok, what is
    wrong."""


_known: dict[tuple[str, torch.device], Result] = {}
_one_at_a_time = threading.Lock()


def first_use(op: str, device: torch.device) -> Result:
    """Whether ``auto`` may use the Triton kernels of ``op`` on ``device``; a dict lookup after the
    first call. Warns once if it may not.

    Where the check cannot run now (the device of a fake tensor, a CUDA graph that is being
    captured), the kernels are trusted until it can.
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
            f"ppo_fast: {op} uses the slower reference on {device}, for its Triton kernels failed "
            f"the check of their first use: {result.detail}. `ppo-fast doctor` checks again, "
            "and what it finds is remembered.",
            RuntimeWarning,
            stacklevel=5,  # who called the op
        )
    return result


def check(op: str, device: torch.device, impl: Impl = "triton") -> Result:
    """Compare ``op`` on ``device`` with the reference in float64, on a small case."""
    # Modes (fake tensors, inference, autocast, a default device) belong to a thread: a new one has
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
    """Some hundred times what right kernels show."""
    of_inputs_dtype = name.startswith("gradient") or op == "decode_attention"
    if of_inputs_dtype and dtype == torch.bfloat16:
        return 1e-2  # stored in it: half an ulp is 2e-3
    if not name.startswith("gradient"):
        return 1e-4
    return 2e-3 if op == "linear_logprobs" else 1e-4  # its products may run in TF32


# What was found


def remembered(op: str, device: torch.device) -> Result | None:
    """What an earlier check of these kernels on this GPU, driver and compiler found."""
    try:
        result = Result(**_read_memory()[installation(device)][op])
    except (KeyError, TypeError):
        return None
    return result if isinstance(result.ok, bool) else None


def check_and_remember(op: str, device: torch.device) -> Result:
    """Check, whatever is remembered. A check that raised is not remembered: a missing compiler, a
    full memory may be gone the next time."""
    result = _known[op, device] = check(op, device)
    if not math.isnan(result.error):
        _remember(op, installation(device), result)
    return result


def memory_path() -> Path:
    """In ``$XDG_CACHE_HOME``, or ``~/.cache`` where that is not set."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ppo_fast" / "self_check.json"


def _read_memory() -> dict[str, Any]:
    try:
        memory = json.loads(memory_path().read_text("utf-8"))
    except (OSError, ValueError, RuntimeError):  # no file; not JSON; no home
        return {}
    return memory if isinstance(memory, dict) else {}


def _remember(op: str, where: str, result: Result) -> None:
    """Of two processes that write at once, one is forgotten, and its check made again some day."""
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
    """What an answer holds for: the GPU, what compiles and runs the kernels, the kernels."""
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
    """Version of the GPU's driver, or where that is hidden, of the CUDA that it knows."""
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
