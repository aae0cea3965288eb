"""Coefficients that change from step to step."""

from __future__ import annotations

from math import exp

import pytest

from ppo_fast.config import PPOConfig
from ppo_fast.learning.coefficients import Coefficients, adapted_bonus, adapted_kl


def test_fixed_coefficients_do_not_change():
    found = Coefficients(PPOConfig(kl_penalty=0.3, entropy_coef=0.01))
    found.adapt(kl=100.0, entropy=0.1, count=64)
    assert (found.kl(0.7), found.entropy(0.1)) == (0.3, 0.01)


@pytest.mark.parametrize(
    ("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (12.0, 0.2), (5.4, -0.1), (0.0, -0.2), (-3.0, -0.2)]
)
def test_the_adaptive_coefficient_follows_the_clipped_error(kl, error):
    assert adapted_kl(0.2, kl, 6.0, 0.5) == pytest.approx(0.2 * (1 + error * 0.5))


def test_the_adaptive_coefficient_over_a_horizon():
    config = PPOConfig(kl_penalty=0.2, kl_controller="adaptive", kl_target=6.0, kl_horizon=1000)
    found = Coefficients(config)
    for _ in range(100):
        found.adapt(kl=60.0, entropy=1.0, count=10)
    assert found.kl(0.0) == pytest.approx(0.2 * exp(0.2), rel=1e-3)
    other = Coefficients(config)
    other.load_state_dict(found.state_dict())
    assert other.kl(0.0) == found.kl(0.0)


def test_a_linear_coefficient():
    config = PPOConfig(kl_penalty=0.2, kl_controller="linear", kl_penalty_end=0.0)
    found = Coefficients(config)
    assert [found.kl(share) for share in (0.0, 0.25, 1.0, 2.0)] == pytest.approx([0.2, 0.15, 0, 0])


def test_the_entropy_bonus_goes_towards_its_target():
    assert adapted_bonus(0.01, 0.5, 1.0, 0.005) == pytest.approx(0.015)
    assert adapted_bonus(0.01, 1.5, 1.0, 0.005) == pytest.approx(0.005)
    assert adapted_bonus(0.003, 1.5, 1.0, 0.005) == 0.0
    assert adapted_bonus(0.01, 1.0, 1.0, 0.005) == 0.01
    found = Coefficients(PPOConfig(entropy_target=1.0, entropy_coef_step=0.01))
    assert found.entropy(0.5) == 0.0
    found.adapt(kl=0.0, entropy=0.5, count=1)
    assert (found.entropy(0.5), found.entropy(1.5)) == (0.01, 0.0)
    other = Coefficients(PPOConfig(entropy_target=1.0))
    other.load_state_dict(found.state_dict())
    assert other.entropy(0.5) == 0.01


def test_a_checkpoint_does_not_override_a_fixed_coefficient():
    found = Coefficients(PPOConfig(kl_penalty=0.3))
    found.load_state_dict({"kl": 0.1, "bonus": 0.2})
    assert (found.kl(0.0), found.entropy(1.0)) == (0.3, 0.0)
