"""Peak rates of this machine, in copying and in float32 products, to compare the kernels with."""

import pytest
import torch
from sides import HIDDEN, TOKENS, VOCAB


def test_copy(benchmark, rounds, show):
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    benchmark.group = "machine"
    benchmark.pedantic(target.copy_, (source,), rounds=rounds(15), warmup_rounds=1)
    rate = 2 * source.nbytes / benchmark.stats.stats.median / 1e9
    benchmark.extra_info |= {"work": "machine: copying 256 MB, bytes read and written"}
    benchmark.extra_info |= {"unit": "GB/s", "sides": {"torch": rate}}
    show()


@pytest.mark.parametrize(
    ("m", "k", "n"), [(2048, 2048, 2048), (TOKENS, HIDDEN, VOCAB)], ids=["square", "head"]
)
def test_sgemm(benchmark, rounds, show, m, k, n):
    a, b = torch.randn(m, k), torch.randn(n, k)
    out = torch.empty(m, n)
    benchmark.group = "machine"
    benchmark.pedantic(torch.mm, (a, b.T), {"out": out}, rounds=rounds(15), warmup_rounds=1)
    rate = 2 * m * k * n / benchmark.stats.stats.median / 1e9
    benchmark.extra_info |= {"work": f"machine: float32 product, [{m}, {k}] x [{k}, {n}]"}
    benchmark.extra_info |= {"unit": "GFLOP/s", "sides": {"torch": rate}}
    show()
