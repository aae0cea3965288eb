"""The time of each part of our PPO steps, and its rate beside the peak of this machine."""

import pytest
from step_parts import Work, measure_peaks, seconds_of_parts, work_of_parts
from step_sides import SIDES

ROUNDS = 3


@pytest.fixture(scope="module")
def smollm2():
    return pytest.importorskip("ppo_fast.demo.smollm2").load_smollm2()


@pytest.mark.parametrize("work", SIDES)
def test_parts(benchmark, rounds, show, smollm2, work):
    step = SIDES[work]["ppo_fast"](smollm2)
    trainer, found = step.__self__.trainer, []

    def measure():
        found.append(seconds_of_parts(trainer, step))

    measured = rounds(ROUNDS)
    benchmark.group = "parts of a step"
    benchmark.pedantic(measure, rounds=measured, warmup_rounds=1)
    # the parts of one round, the median one, so that they add up
    by_time = sorted(found[-measured:], key=lambda parts: sum(parts.values()))
    seconds = by_time[measured // 2]
    total = sum(seconds.values())
    if measured % 2:
        assert total == pytest.approx(benchmark.stats.stats.median, rel=0.01)
    assert seconds["rest"] < 0.05 * total
    works, peaks = work_of_parts(trainer), measure_peaks()
    sides = {
        name + peaks.rate(works.get(name, Work()), took): took for name, took in seconds.items()
    }
    benchmark.extra_info |= {"work": work.replace("a PPO step", "its parts"), "unit": "s"}
    benchmark.extra_info["sides"] = {"all of it": total} | sides
    show()
