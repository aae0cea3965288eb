"""The machine, its peak rates, and the behaviour of torch on a GPU that ppo_fast relies on.

python benchmarks/on_gpu/facts.py [--cpu]
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy
import torch
import torch.nn.functional as F
import transformers
import triton
from common import DEVICE, ON_GPU, attempt, note, parser, seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
if ON_GPU:
    BACKENDS["cudnn"] = SDPBackend.CUDNN_ATTENTION
    BACKENDS["efficient"] = SDPBackend.EFFICIENT_ATTENTION


def backend(name: str) -> AbstractContextManager[None]:
    return nullcontext() if name == "default" else sdpa_kernel(BACKENDS[name])


def best(run: Callable[[], object], tries: int = 10) -> float:
    run()
    return min(seconds(run)[0] for _ in range(tries))


def machine() -> None:
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }
    if ON_GPU:
        gpu = torch.cuda.get_device_properties(0)
        gigabytes = gpu.total_memory / 2**30
        found |= {"gpu": gpu.name, "multiprocessors": gpu.multi_processor_count, "GiB": gigabytes}
    note("machine", **found)


def ceilings() -> None:
    n = 2**30 if ON_GPU else 2**20
    source = torch.randint(255, (n,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copied = 2 * n / best(lambda: target.copy_(source)) / 1e9
    size = 8192 if ON_GPU else 64
    a, b = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    bf16 = 2 * size**3 / best(lambda: a @ b) / 1e12
    a, b = a.float()[: size // 2], b.float()
    float32 = size**3 / best(lambda: a @ b) / 1e12
    note("ceilings", copy_gb_s=copied, bf16_tflop_s=bf16, float32_tflop_s=float32)


def products() -> None:
    """Check float32 results of bfloat16 operands, by torch.mm and torch.addmm (triton_tiles.py)."""
    if not ON_GPU:
        return
    h = torch.randn(100, 64, device=DEVICE).bfloat16()
    w = torch.randn(507, 64, device=DEVICE).bfloat16()
    exact = h.double() @ w.double().T
    out = torch.full((100, 512), math.nan, device=DEVICE)[:, :507]
    torch.mm(h, w.T, out_dtype=torch.float32, out=out)
    mm = ((out.double() - exact).abs().max() / exact.abs().max()).item()
    total = torch.randn(100, 64, device=DEVICE)
    g = torch.randn(100, 512, device=DEVICE).bfloat16()[:, :507]
    expected = total.double() + g.double() @ w.double()
    torch.addmm(total, g, w, out_dtype=torch.float32, out=total)
    addmm = ((total.double() - expected).abs().max() / expected.abs().max()).item()
    note("products", mm_error=mm, addmm_error=addmm)


def masked_case(rows: int, columns: int, *, batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    def make(n: int) -> Tensor:
        return torch.randn(batch, 8, n, 64, device=DEVICE).bfloat16().requires_grad_()

    return make(rows), make(columns), make(columns)


def attention_choices() -> None:
    """Record the backend that SDPA chooses for causal passes without a mask, and with one."""
    if not ON_GPU:
        return
    q, k, v = masked_case(96, 96)
    mask = torch.ones(96, 96, dtype=torch.bool, device=DEVICE).tril()[None, None]
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        causal = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True))
        masked = SDPBackend(torch._fused_sdp_choice(q, k, v, mask))
        note("attention", cudnn_allowed=cudnn, causal=causal.name, masked=masked.name)
    torch.backends.cuda.enable_cudnn_sdp(True)


def rows_that_see_nothing() -> None:
    """Try left padding with a mask, which ppo_fast's passes do without."""
    q, k, v = masked_case(96, 96)
    mask = torch.ones(96, 96, dtype=torch.bool, device=DEVICE).tril()[None, None].repeat(4, 1, 1, 1)
    mask[1, :, :, :10] = False
    for name in BACKENDS:
        try:
            with backend(name):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        except RuntimeError as error:
            note("rows that see nothing", backend=name, error=str(error)[:80])
            continue
        empty = out[1, :, :10]
        note("rows that see nothing", backend=name, finite=bool(empty.isfinite().all()))


def new_shapes() -> None:
    """Time a shape's first forward and backward pass, and its second."""
    for name in ("default", "efficient") if ON_GPU else ("default",):
        for length in (321, 322, 323) if ON_GPU else (11, 12):
            q, k, v = masked_case(length, length)
            mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()[None, None]

            def run(q=q, k=k, v=v, mask=mask, name=name) -> None:
                with backend(name):
                    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                out.backward(torch.ones_like(out))

            with attempt("new shape"):
                first, second = seconds(run)[0], seconds(run)[0]
                note("new shape", backend=name, length=length, first_s=first, second_s=second)


def nan_gradients() -> None:
    """Count NaN in a gradient: https://github.com/pytorch/pytorch/issues/196678."""
    length, size = 704, 64
    for name in ("default", "efficient") if ON_GPU else ("default",):
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(1, 1, length, size, device=DEVICE).mul(0.1).bfloat16() for _ in range(3)
        )
        q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(size)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()[None, None]
        with attempt("pytorch 196678"):
            with backend(name):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out.backward(torch.randn_like(out))
            wrong = int((~q.grad.isfinite()).sum())  # type: ignore[union-attr]
            note("pytorch 196678", backend=name, nan_in_grad_q=wrong)


PARTS = (
    machine,
    ceilings,
    products,
    attention_choices,
    rows_that_see_nothing,
    new_shapes,
    nan_gradients,
)

if __name__ == "__main__":
    parser().parse_args()
    for part in PARTS:
        with attempt(part.__name__):
            part()
