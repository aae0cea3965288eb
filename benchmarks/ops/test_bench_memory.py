"""Peak memory: of linear_logprobs, which is the head of an update, and of whole PPO steps."""

import sys

import heads
import pytest
from memory import peak_megabytes, step_gigabytes
from step_sides import SIDES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def weigh(benchmark, show):
    """Return weigh(work, unit, weights), which prints what each side's function returns."""

    def weigh(work, unit, weights, decimals=1):
        amounts = {}
        benchmark.group = "memory"
        benchmark.pedantic(lambda: amounts.update({name: f() for name, f in weights.items()}))
        benchmark.extra_info |= {"work": work, "unit": unit, "sides": amounts}
        show(decimals=decimals)

    return weigh


@pytest.mark.parametrize(
    ("entropy", "frozen"),
    [(True, False), (False, False), (False, True)],
    ids=["entropy", "log-prob alone", "frozen head"],
)
def test_memory(weigh, entropy, frozen):
    """Measure forward and backward of linear_logprobs beyond the gradients that it returns.

    It is the head of an update of 8 responses of 64 tokens. Under gradient checkpointing logits are
    recomputed.
    """
    names = [heads.RECOMPUTED, heads.KEPT, *heads.EAGER, *(() if entropy else heads.TORCH)]
    what = "with entropy" if entropy else "log-prob alone"
    head = "frozen" if frozen else "trained"
    work = f"linear_logprobs, {what}, {head} head: peak memory beyond the gradients"
    sides = {name: lambda n=name: peak_megabytes("heads", n, entropy, frozen) for name in names}
    weigh(work, "MB", sides)


@pytest.mark.parametrize("work", SIDES)
def test_steps(weigh, work):
    """Measure the whole process, including the models."""
    pytest.importorskip("ppo_fast.demo.smollm2")
    sides = {name: lambda n=name: step_gigabytes("step_sides", work, n) for name in SIDES[work]}
    weigh(f"{work}: peak memory of the process", "GB", sides, decimals=2)
