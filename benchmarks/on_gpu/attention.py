"""Time attention: decode_attention beside PyTorch's in a decoding step, PyTorch's in training, and
the ways to compute that of packed tokens.

python benchmarks/on_gpu/attention.py [--cpu]
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import DEVICE, ON_GPU, attempt, note, parser, seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ppo_fast.data.tokens import make_tokens
from ppo_fast.models.packed_attention import PackedPass, Way, by_blocks, padded, varlen
from ppo_fast.ops import decode_attention

# Rows, keys, heads of queries and of keys, head size.
SIZES = (
    (32, 256, 9, 3, 64),
    (32, 256, 32, 8, 64),
    (32, 2048, 32, 8, 128),
    (4, 8192, 32, 8, 128),
    (64, 1024, 28, 4, 128),
)
TINY = ((3, 40, 4, 2, 16),)
# Rows, length, heads of queries and of keys, head size.
TRAINING = ((64, 256, 32, 8, 64), (8, 2048, 32, 8, 128))
TINY_TRAINING = ((2, 8, 4, 2, 16),)
# Prompts, samples of each, prompt's and response's longest length, heads, head size.
PACKED = ((64, 1, 256, 128, 32, 8, 64), (8, 8, 512, 128, 32, 8, 64))
TINY_PACKED = ((2, 2, 5, 3, 4, 2, 16),)
BACKENDS = {
    "masked efficient": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "masked cudnn": [SDPBackend.CUDNN_ATTENTION],
    "causal gqa flash": [SDPBackend.FLASH_ATTENTION],
    "causal gqa cudnn": [SDPBackend.CUDNN_ATTENTION],
    "causal gqa efficient": [SDPBackend.EFFICIENT_ATTENTION],
}
CALLS = 10  # in a graph, so that launches do not count


def forms(
    rows: int, columns: int, heads: int, kv_heads: int, size: int
) -> tuple[dict[str, Callable[[], Tensor]], float]:
    """Return functions that give the same [rows, heads, size], and the bytes they must read."""
    dtype = torch.bfloat16
    cache = torch.randn(2, rows, columns + 64, kv_heads, size, device=DEVICE).to(dtype)
    keys, values = cache[:, :, :columns]
    query = torch.randn(rows, heads, size, device=DEVICE).to(dtype)
    lengths = torch.randint(columns // 2, columns + 1, (rows,), device=DEVICE)
    seen = torch.arange(columns, device=DEVICE) < lengths[:, None]
    mask = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[:, None, None]
    scaling, group = size**-0.5, heads // kv_heads
    k, v = keys.transpose(1, 2), values.transpose(1, 2)

    def copied() -> Tensor:
        """Attend as transformers does with a mask."""
        every_k, every_v = (x.repeat_interleave(group, 1) for x in (k, v))
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(query[:, :, None], every_k, every_v, mask)
        return out[:, :, 0]

    def grouped() -> Tensor:
        rows_of_queries = query.view(rows, kv_heads, group, size)
        masks = mask.expand(-1, -1, group, -1)
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(rows_of_queries, k, v, masks)
        return out.reshape(query.shape)

    ways = {
        "ppo_fast": lambda: decode_attention(query, keys, values, lengths, scaling=scaling),
        "SDPA, keys copied to all heads": copied,
        "SDPA, a group's queries as rows": grouped,
    }
    return ways, 2.0 * 2 * float(lengths.sum()) * kv_heads * size


def microseconds(form: Callable[[], Tensor]) -> float:
    form()
    if not ON_GPU:
        return 1e6 * seconds(form)[0]
    from triton.testing import do_bench

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            form()
    return 1e3 * do_bench(graph.replay, warmup=5, rep=30, return_mode="median") / CALLS


def training(rows: int, length: int, heads: int, kv_heads: int, size: int) -> None:
    """Time forward and backward of causal attention, with a mask and without."""
    shapes = ((rows, n, length, size) for n in (heads, kv_heads, kv_heads))
    q, k, v = (torch.randn(*s, device=DEVICE).bfloat16().requires_grad_() for s in shapes)
    mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()[None, None]
    found: dict[str, float | str] = {}
    for title, backend in BACKENDS.items():
        causal = title.startswith("causal")
        how = {"is_causal": True} if causal else {"attn_mask": mask}

        def run(how: dict = how, backend: list[SDPBackend] = backend) -> Tensor:  # type: ignore[type-arg]
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)
            return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))[0]

        try:
            run()
            found[title] = round(median_ms(run), 3)
        except RuntimeError as error:  # this form has no such kernel
            found[title] = str(error).split("\n")[0]
    note(
        "training attention, ms forward and backward",
        b=rows,
        h=heads,
        hkv=kv_heads,
        size=size,
        length=length,
        found=json.dumps(found),
    )


def packed(
    prompts: int, samples: int, prompt: int, response: int, heads: int, kv_heads: int, size: int
) -> None:
    """Check and time forward and backward of the ways to compute attention of packed tokens."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, prompt + 1, (prompts,), generator=g).repeat_interleave(samples)
    ids = [[i // samples] * n for i, n in enumerate(lengths.tolist())]
    new = torch.randint(1, response + 1, (len(ids),), generator=g).tolist()
    tokens = make_tokens(ids, [[1] * n for n in new], 0, torch.device(DEVICE))
    packed_pass = PackedPass(tokens, None)
    shapes = ((1, n, len(tokens.packing), size) for n in (heads, kv_heads, kv_heads))
    q, k, v = (torch.randn(*s, device=DEVICE).bfloat16().requires_grad_() for s in shapes)
    exact = by_blocks(packed_pass, *(x.detach().double() for x in (q, k, v)), None, 0)
    for way in (by_blocks, varlen, padded) if ON_GPU else (by_blocks, padded):
        with attempt(f"packed attention: {way.__name__}"):

            def run(way: Way = way) -> Tensor:
                out = way(packed_pass, q, k, v, None, 0)
                return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))[0]

            off = (way(packed_pass, q, k, v, None, 0).double() - exact).abs().max().item()
            note(
                "packed attention, ms forward and backward",
                work=f"{prompts} prompts x {samples}, {len(tokens.packing)} tokens",
                way=way.__name__,
                ms=round(median_ms(run), 3),
                off=off,
            )


def median_ms(form: Callable[[], Tensor]) -> float:
    if not ON_GPU:
        return 1e3 * seconds(form)[0]
    from triton.testing import do_bench

    return do_bench(form, return_mode="median")


def main() -> None:
    parser().parse_args()
    for sizes in TRAINING if ON_GPU else TINY_TRAINING:
        with attempt("attention: training"):
            training(*sizes)
    for sizes in PACKED if ON_GPU else TINY_PACKED:
        with attempt("packed attention"):
            packed(*sizes)
    with torch.no_grad():
        decoding()


def decoding() -> None:
    for sizes in SIZES if ON_GPU else TINY:
        with attempt("attention"):
            ways, nbytes = forms(*sizes)
            expected = ways["SDPA, keys copied to all heads"]().double()
            for title, form in ways.items():
                off = (form().double() - expected).abs().max().item()
                took = microseconds(form)
                work = "{} rows x {} keys, {} heads on {}, {} each".format(*sizes)
                rate = nbytes / took / 1e3
                note("attention", work=work, side=title, us=round(took, 1), gb_s=rate, off=off)


if __name__ == "__main__":
    main()
