"""Whole PPO steps of SmolLM2-135M: ours against plain ones, and with a trunk against without.

Responses have one length (nothing ends them); 4 epochs are 4 optimizer steps. Each side has its own
models, which go on learning from round to round.
"""

import pytest
from step_sides import SIDES, Ours

ROUNDS = 3


@pytest.fixture(scope="module")
def smollm2():
    return pytest.importorskip("ppo_fast.demo.smollm2").load_smollm2()


@pytest.mark.parametrize("work", SIDES)
def test_step(turns, smollm2, capsys, work):
    steps = {name: make(smollm2) for name, make in SIDES[work].items()}
    turns(work, steps, rounds=ROUNDS, warm=False)
    for name, step in steps.items():
        if isinstance(step.__self__, Ours):
            show(name, step.__self__.spent, capsys)


def show(name, spent, capsys):
    shares = ", ".join(f"{part} {seconds / spent.total():.0%}" for part, seconds in spent.items())
    with capsys.disabled():
        print(f"  {name}: {shares}")
