"""The check of first use: Triton kernels against the float64 reference, once an installation.

No test of ours has seen a given user's GPU, driver and compiler. So the first use of an op's Triton
kernels under ``impl="auto"`` compares them with the reference, which runs on the CPU, on a small
case: forward and gradients, an odd vocabulary of more than one block, a mask over NaN, a
temperature. The answer is remembered in the user's cache directory. Kernels that are wrong, or
raise, are not used by ``auto``; an explicit ``impl="triton"`` is not stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast import ops
from ppo_fast.ops.stats import PPO_STATS, VALUE_STATS

if TYPE_CHECKING:
    from ppo_fast.ops.backends.dispatch import Impl


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
    case, dtypes = CASES[op]
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

    from ppo_fast import __version__

    ops = Path(__file__).parents[1]
    sources = sorted([*ops.glob("*.py"), *ops.glob("backends/*.py"), *ops.glob("*/triton*.py")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return (
        f"{torch.cuda.get_device_name(device)}, driver {driver()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, ppo_fast {__version__}, kernels {digest[:12]}"
    )


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


# What is checked


class Side:
    """One side of a comparison: where and how a case runs, and its numbers, equal on both."""

    def __init__(
        self, impl: Impl, device: torch.device, dtype: torch.dtype, holds: torch.dtype
    ) -> None:
        """The numbers are of ``dtype``, held in ``holds``: float64 for the reference."""
        self.impl, self.device = impl, device
        self._dtype, self._holds = dtype, holds
        self._generator = torch.Generator("cpu").manual_seed(1)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers of 8 significant bits: exact in bfloat16, and factors exact in TF32."""
        return self._normal(shape, scale).to(self._dtype).to(self.device, self._holds)

    def integers(self, high: int, *shape: int) -> Tensor:
        x = torch.randint(high, shape, generator=self._generator, device="cpu")
        return x.to(self.device)

    def mask(self, *shape: int) -> Tensor:
        """True three times out of four."""
        return self.integers(4, *shape) > 0

    def gradients(self, outputs: list[Tensor], **inputs: Tensor) -> dict[str, Tensor]:
        """Of the named inputs, for random upstream gradients."""
        upstream = [self._normal(tuple(y.shape), 1.0).to(y) for y in outputs]
        grads = torch.autograd.grad(outputs, list(inputs.values()), upstream)
        return {f"gradient of {x}": grad for x, grad in zip(inputs, grads, strict=True)}

    def _normal(self, shape: tuple[int, ...], scale: float) -> Tensor:
        x = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return (x * scale).bfloat16().float()


def _nan_outside(mask: Tensor, x: Tensor) -> Tensor:
    return x.masked_fill(~mask, math.nan)


def _logprobs_from_logits(side: Side) -> dict[str, Tensor]:
    mask, labels = side.mask(4), side.integers(4129, 4)
    logits = _nan_outside(mask[:, None], side.normal(4, 4129, scale=3.0)).requires_grad_()
    labels = labels.masked_fill(~mask, -100)
    out = ops.logprobs_from_logits(logits, labels, mask=mask, temperature=0.7, impl=side.impl)
    assert out.entropy is not None
    gradients = side.gradients([out.logprobs, out.entropy], logits=logits)
    return {"logprobs": out.logprobs, "entropy": out.entropy, **gradients}


def _linear_logprobs(side: Side) -> dict[str, Tensor]:
    mask, labels = side.mask(9), side.integers(507, 9)
    hidden = _nan_outside(mask[:, None], side.normal(9, 64)).requires_grad_()
    weight = side.normal(507, 64, scale=0.3).requires_grad_()
    bias = side.normal(507).requires_grad_()
    out = ops.linear_logprobs(
        hidden,
        weight,
        labels,
        bias=bias,
        mask=mask,
        temperature=0.7,
        logit_scale=0.5,
        softcap=5.0,
        logits_budget_bytes=0,
        impl=side.impl,
    )
    assert out.entropy is not None
    gradients = side.gradients([out.logprobs, out.entropy], hidden=hidden, weight=weight, bias=bias)
    return {"logprobs": out.logprobs, "entropy": out.entropy, **gradients}


def _gae(side: Side) -> dict[str, Tensor]:
    mask, dones = side.mask(2, 1031), side.integers(40, 2, 1031) == 0
    out = ops.gae(
        _nan_outside(mask, side.normal(2, 1031)),
        _nan_outside(mask, side.normal(2, 1031)),
        mask=mask,
        dones=dones,
        bootstrap_value=side.normal(2),
        gamma=0.99,
        lam=0.95,
        impl=side.impl,
    )
    return out._asdict()


def _kl_estimate(side: Side) -> dict[str, Tensor]:
    mask = side.mask(3, 701)
    found: dict[str, Tensor] = {}
    for estimator in ("k3", "k1+k2"):
        logprobs = _nan_outside(mask, side.normal(3, 701, scale=0.5)).requires_grad_()
        ref = _nan_outside(mask, side.normal(3, 701, scale=0.5))
        kl = ops.kl_estimate(logprobs, ref, mask=mask, estimator=estimator, impl=side.impl)
        (gradient,) = side.gradients([kl], logprobs=logprobs).values()
        found |= {estimator: kl, f"gradient of {estimator}": gradient}
    return found


def _ppo_loss(side: Side) -> dict[str, Tensor]:
    mask = side.mask(3, 701)
    names = ("logprobs", "entropy", "old_logprobs", "advantages", "ref_logprobs")
    x: dict[str, Any] = {name: _nan_outside(mask, side.normal(3, 701, scale=0.5)) for name in names}
    logprobs, entropy = x["logprobs"].requires_grad_(), x["entropy"].requires_grad_()
    out = ops.ppo_loss(
        **x,
        mask=mask,
        dual_clip=1.5,
        kl_coef=0.1,
        kl_estimator="k3",
        entropy_coef=0.02,
        aggregation="seq-mean-token-mean",
        impl=side.impl,
    )
    gradients = side.gradients([out.loss], logprobs=logprobs, entropy=entropy)
    metrics = dict(zip(PPO_STATS, out.metrics.unbind(), strict=True))
    return {"loss": out.loss, **metrics, **gradients}


def _value_loss(side: Side) -> dict[str, Tensor]:
    mask = side.mask(3, 701)
    values, old, returns = (_nan_outside(mask, side.normal(3, 701)) for _ in range(3))
    values.requires_grad_()
    out = ops.value_loss(
        values, old_values=old, returns=returns, mask=mask, clip=0.5, impl=side.impl
    )
    metrics = dict(zip(VALUE_STATS, out.metrics.unbind(), strict=True))
    return {"loss": out.loss, **metrics, **side.gradients([out.loss], values=values)}


def _whiten(side: Side) -> dict[str, Tensor]:
    mask = side.mask(3, 701)
    values = _nan_outside(mask, side.normal(3, 701, scale=3.0)).requires_grad_()
    whitened = ops.whiten(values, mask=mask, impl=side.impl)
    return {"whitened": whitened, **side.gradients([whitened], values=values)}


def _sample_tokens(side: Side) -> dict[str, Tensor]:
    logits, seeds = side.normal(2, 4129, scale=3.0), side.integers(2**62, 2) - 2**61
    positions = side.integers(2**20, 2)
    found: dict[str, Tensor] = {}
    for words, top_k, top_p in (("", 0, 1.0), ("truncated ", 50, 0.9)):
        drawn = ops.sample_tokens(
            logits, seeds, positions, temperature=0.7, top_k=top_k, top_p=top_p, impl=side.impl
        )
        found |= {words + name: x for name, x in drawn._asdict().items()}
    return found


def _decode_attention(side: Side) -> dict[str, Tensor]:
    """A slice of a cache that is NaN where no row looks; rows of one column, of three chunks."""
    lengths = torch.tensor([1, 507, 1203], device=side.device)
    query = side.normal(3, 6, 80)
    keys, values = side.normal(4, 1301, 2, 80)[:3], side.normal(4, 1301, 2, 80)[:3]
    column = torch.arange(1301, device=side.device)
    found: dict[str, Tensor] = {}
    for words, window in (("result", None), ("with a window", 600)):
        seen = column < lengths[:, None]
        if window is not None:
            seen &= column >= lengths[:, None] - window
        k, v = (_nan_outside(seen[..., None, None], x)[:, :1203] for x in (keys, values))
        found[words] = ops.decode_attention(
            query, k, v, lengths, scaling=80**-0.5, window=window, impl=side.impl
        )
    return found


# By op: the case, and the dtypes that it is run in.
CASES: dict[str, tuple[Callable[[Side], dict[str, Tensor]], tuple[torch.dtype, ...]]] = {
    "logprobs_from_logits": (_logprobs_from_logits, (torch.float32, torch.bfloat16)),
    "linear_logprobs": (_linear_logprobs, (torch.float32, torch.bfloat16)),
    "gae": (_gae, (torch.float32,)),
    "kl_estimate": (_kl_estimate, (torch.float32,)),
    "ppo_loss": (_ppo_loss, (torch.float32,)),
    "value_loss": (_value_loss, (torch.float32,)),
    "whiten": (_whiten, (torch.float32,)),
    "sample_tokens": (_sample_tokens, (torch.float32, torch.bfloat16)),
    "decode_attention": (_decode_attention, (torch.float32, torch.bfloat16)),
}
