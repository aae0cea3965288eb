"""Learning rates over a run's optimizer steps."""

from __future__ import annotations

from math import cos, pi

import pytest
import torch

from ppo_fast.config import PPOConfig
from ppo_fast.learning.schedules import Schedule, current_rates, rate_factor


def factors(steps: int = 13, total: int = 10, **settings) -> list[float]:
    factor = rate_factor(PPOConfig(**settings), total)
    return [factor(done) for done in range(steps)]


def test_linear_with_warmup():
    assert factors(lr_schedule="linear", lr_warmup=2) == pytest.approx(
        [0.0, 0.5, *[1 - i / 8 for i in range(8)], 0.0, 0.0, 0.0]
    )


def test_cosine_ends_at_its_floor_and_stays_there():
    expected = [0.1 + 0.9 * (1 + cos(pi * min(i, 10) / 10)) / 2 for i in range(13)]
    assert factors(lr_schedule="cosine", lr_floor=0.1) == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [3, 0.3])
def test_warmup_by_steps_or_by_share(warmup):
    expected = [0.0, 1 / 3, 2 / 3, *[1.0] * 10]
    assert factors(lr_warmup=warmup) == pytest.approx(expected)


def test_a_warmup_may_not_take_the_whole_run():
    with pytest.raises(ValueError, match=r"lr_warmup: got 10, 10 optimizer steps, but the run has"):
        factors(lr_schedule="linear", lr_warmup=10)


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)


def run(schedule: Schedule, name: str, steps: int, updates: int) -> list[float]:
    """Return the rates of ``updates`` updates of ``steps`` optimizer steps."""
    one, rates = optimizer(), []
    for update in range(updates):
        schedule.begin_update(update)
        for _ in range(steps):
            schedule.before_step(name, one)
            rates.append(one.param_groups[0]["lr"])
    return rates


def test_policy_and_value_function_have_schedules_of_their_own():
    config = PPOConfig(
        lr_schedule="linear", num_minibatches=2, value_epochs=3, critic_warmup_steps=2
    )
    schedule = Schedule(config, {"policy": 1.0, "value": 10.0})
    schedule.plan(total_steps=6, num_epochs=1)
    # 4 steps of 1 epoch of 2 minibatches; 6 steps of 3 epochs of 2 minibatches
    found = run(schedule, "policy", 2, 6)[4:]
    assert found == pytest.approx([1 - i / 8 for i in range(8)])
    found = run(schedule, "value", 6, 6)
    assert found == pytest.approx([10 * (1 - i / 36) for i in range(36)])


def test_optimizer_steps_that_are_left_out_delay_nothing():
    schedule = Schedule(PPOConfig(lr_schedule="linear", num_minibatches=4), {"policy": 1.0})
    schedule.plan(total_steps=5, num_epochs=2)
    assert run(schedule, "policy", 1, 5) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_a_schedule_that_has_ended_at_zero_is_refused():
    schedule = Schedule(PPOConfig(lr_schedule="linear", schedule_steps=3), {"policy": 1.0})
    schedule.check(2)
    with pytest.raises(ValueError, match="the learning rate is 0 after the schedule's 3 steps"):
        schedule.check(3)


def test_without_a_schedule_a_users_own_rate_stays():
    schedule = Schedule(PPOConfig(), {"policy": 1.0})
    schedule.plan(5, 1)
    assert run(schedule, "policy", 1, 3) == [0.5] * 3
    assert current_rates({"policy": optimizer()}) == {"learning_rate": 0.5}


def test_step_alone_does_not_know_the_runs_length():
    schedule = Schedule(PPOConfig(lr_schedule="cosine"), {"policy": 1.0})
    with pytest.raises(ValueError, match=r"call train\(\), or set schedule_steps"):
        schedule.check(0)
    Schedule(PPOConfig(lr_schedule="cosine", schedule_steps=9), {"policy": 1.0}).check(0)
    Schedule(PPOConfig(lr_warmup=4), {"policy": 1.0}).check(0)


@pytest.mark.parametrize("name", ["schedule_steps", "critic_warmup_steps"])
def test_a_schedule_longer_than_the_run(name):
    schedule = Schedule(PPOConfig(**{name: 20}), {"policy": 1.0})
    with pytest.raises(ValueError, match=rf"{name}: got 20, but the run has 10 steps"):
        schedule.plan(10, 1)


def test_the_share_of_a_run():
    schedule = Schedule(PPOConfig(), {"policy": 1.0})
    assert schedule.share(3) == 0.0
    schedule.plan(5, 1)
    assert [schedule.share(n) for n in (0, 2, 4, 9)] == [0.0, 0.5, 1.0, 1.0]
