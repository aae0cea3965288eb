"""A decoding step's attention: decode_attention beside forms of scaled_dot_product_attention.

python benchmarks/on_gpu/attention.py [--cpu]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import DEVICE, ON_GPU, attempt, note, parser, seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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
CALLS = 10  # in a graph, so that launches do not count


def forms(
    rows: int, columns: int, heads: int, kv_heads: int, size: int
) -> tuple[dict[str, Callable[[], Tensor]], float]:
    """Ways to the same [rows, heads, size], and the bytes of keys and values that they need."""
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
        """What transformers does with a mask."""
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


@torch.no_grad()
def main() -> None:
    parser().parse_args()
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
