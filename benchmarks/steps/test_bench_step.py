"""Whole PPO steps of SmolLM2-135M: ours against plain ones, and with a trunk against without.

Responses have one length (nothing ends them); 4 epochs are 4 optimizer steps. Each side has a
process and models of its own, which go on learning from round to round.
"""

import pytest
from own_process import OwnProcess
from step_sides import SIDES

pytestmark = pytest.mark.timeout(1800)
ROUNDS = 3


@pytest.mark.parametrize("work", SIDES)
def test_step(turns, capsys, work):
    pytest.importorskip("ppo_fast.demo.smollm2").load_smollm2()
    sides = {name: OwnProcess("step_sides", work, name) for name in SIDES[work]}
    try:
        turns(work, {name: side.step for name, side in sides.items()}, rounds=ROUNDS)
    finally:
        for side in sides.values():
            side.end()
    for name, side in sides.items():
        if side.spent:
            show(name, side.spent, capsys)


def show(name, spent, capsys):
    total = sum(spent.values())
    shares = ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in spent.items())
    with capsys.disabled():
        print(f"  {name}: {shares}")
