"""Whole PPO steps of SmolLM2-135M: ours and TRL's PPOTrainer, the same prompts and lengths.

Only the first of ours trains the same weights as TRL's. Each side has a process and models of its
own, which go on learning from round to round.
"""

import sys

import pytest
from memory import step_gigabytes
from own_process import OwnProcess
from whole_steps import APART, SIDES, WORK

pytestmark = pytest.mark.timeout(3600)
ROUNDS = 3


@pytest.mark.parametrize("work", SIDES)
def test_step(turns, work):
    # where a backward pass ends an optimizer's step changes the memory alone
    sides = {n: OwnProcess("whole_steps", work, n) for n in SIDES[work] if n != APART}
    try:
        turns(work, {name: side.step for name, side in sides.items()}, rounds=ROUNDS)
    finally:
        for side in sides.values():
            side.end()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(benchmark, show):
    def weigh():
        return {name: step_gigabytes("whole_steps", WORK, name) for name in SIDES[WORK]}

    benchmark.group = "memory"
    gigabytes = benchmark.pedantic(weigh)
    work = f"{WORK}: peak memory of the whole process"
    benchmark.extra_info |= {"work": work, "unit": "GB", "sides": gigabytes}
    show(decimals=2)
