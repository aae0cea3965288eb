"""Whole PPO steps of SmolLM2-135M: ours and TRL's PPOTrainer, the same prompts and lengths.

Only the first of ours trains the same weights as TRL's. Each side has its own models, which go on
learning from round to round.
"""

import sys

import pytest
from memory import step_gigabytes
from whole_steps import SIDES, WORK

from ppo_fast.demo.smollm2 import load_smollm2

pytestmark = pytest.mark.timeout(3600)
ROUNDS = 3


@pytest.mark.parametrize("work", SIDES)
def test_step(turns, work):
    smollm2 = load_smollm2()
    steps = {name: make(smollm2) for name, make in SIDES[work].items()}
    turns(work, steps, rounds=ROUNDS, warm=False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(benchmark, show):
    def weigh():
        return {name: step_gigabytes("whole_steps", WORK, name) for name in SIDES[WORK]}

    benchmark.group = "memory"
    gigabytes = benchmark.pedantic(weigh)
    work = f"{WORK}: peak memory of the whole process"
    benchmark.extra_info |= {"work": work, "unit": "GB", "sides": gigabytes}
    show(decimals=2)
