"""Whole PPO steps of SmolLM2-135M: ours and TRL's PPOTrainer, the same prompts and lengths.

Only the first of ours trains what TRL's does. A side's models are its own, and go on learning.
"""

import sys

import pytest
from whole_steps import EPOCHS, NEW, SIDES, make_side, peak_gigabytes

from ppo_fast.smollm2 import load_smollm2

pytestmark = pytest.mark.timeout(3600)
ROUNDS = 3
STEP = f"a PPO step: batch 4, {NEW} new tokens, {EPOCHS} epochs"


def test_time(turns):
    smollm2 = load_smollm2()
    sides = {name: make_side(name, smollm2).step for name in SIDES}
    turns(STEP, sides, rounds=ROUNDS, warm=False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(benchmark, show):
    gigabytes = {}
    benchmark.group = "memory"
    benchmark.pedantic(lambda: gigabytes.update({name: peak_gigabytes(name) for name in SIDES}))
    work = f"{STEP}: peak memory of the whole process"
    benchmark.extra_info |= {"work": work, "unit": "GB", "sides": gigabytes}
    show(decimals=2)
