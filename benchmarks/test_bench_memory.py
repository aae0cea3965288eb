"""Peak memory of linear_logprobs, forward and backward, beyond the gradients that it returns."""

import sys

import heads
import pytest
from memory import peak_megabytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize("entropy", [True, False], ids=["entropy", "log-prob alone"])
def test_memory(benchmark, show, entropy):
    names = [heads.RECOMPUTED, heads.KEPT, *heads.EAGER, *(() if entropy else heads.TORCH)]
    megabytes = {}

    def weigh():
        megabytes.update({name: peak_megabytes("heads", name, entropy) for name in names})

    benchmark.group = "memory"
    benchmark.pedantic(weigh)
    what = "with entropy" if entropy else "log-prob alone"
    work = f"linear_logprobs, {what}, trained head: peak memory beyond the gradients"
    benchmark.extra_info |= {"work": work, "unit": "MB", "sides": megabytes}
    show(decimals=1)
