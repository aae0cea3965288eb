"""HalfAdamW against torch's AdamW, and the errors of its two ways of rounding."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_trainer import PROMPTS, tiny_trainer, weights, without_times
from torch import nn

from ppo_fast.learning.half_adamw import HalfAdamW, stochastically_rounded

ROUNDINGS = ("stochastic", "kahan")
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_weights(dtype, seed=0):
    """Return weights of two, one and no dimensions, of magnitudes from 1e-3 to 1e3."""
    draw = generator(seed)
    shapes = ((5, 7), (33,), ())
    return [
        nn.Parameter((torch.randn(s, generator=draw) * 10 ** (3 * i - 3.0)).to(dtype))
        for i, s in enumerate(shapes)
    ]


def take_steps(optimizer, parameters, steps):
    """Take optimizer steps, with gradients that depend on the number of the step alone."""
    for step in steps:
        draw = generator(1000 + step)
        for p in parameters:
            p.grad = (torch.randn(p.shape, generator=draw) * 0.1**step).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_float32_weights_get_the_steps_of_adamw(rounding):
    trained = {}
    for name, dtype in (("ours", torch.float32), ("torch", torch.float32), ("true", torch.float64)):
        parameters = [nn.Parameter(p.data.to(dtype)) for p in random_weights(torch.float32)]
        ours = HalfAdamW(parameters, **SETTINGS, rounding=rounding)
        optimizer = ours if name == "ours" else torch.optim.AdamW(parameters, **SETTINGS)
        for step in range(20):
            draw = generator(step)
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=draw).to(dtype)
            optimizer.step()
        trained[name] = parameters
    for mine, other, true in zip(*trained.values(), strict=True):
        budget = 2 * (other - true).abs().max() + 4 * torch.finfo(torch.float32).eps
        assert (mine - true).abs().max() <= budget


def test_a_weight_without_a_gradient_stays_and_a_closure_is_called():
    without, with_gradient = random_weights(torch.bfloat16)[:2]
    before = without.data.clone()
    optimizer = HalfAdamW([with_gradient, without], **SETTINGS, rounding="kahan")

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = with_gradient.float().square().sum()
        loss.backward()
        return loss.item()

    start = float(with_gradient.detach().float().square().sum())
    assert optimizer.step(closure) == start
    assert with_gradient.float().square().sum() < start
    assert torch.equal(without, before)


# One rounding


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e5, 1e30])
def test_stochastic_rounding_gives_a_neighbour_and_the_mean_is_right(scale):
    count = 20_000
    x = scale * torch.tensor([1.0, -1.0, 1.001, -1.0039, 1.9999, -3.3, 1 / 3, 0.7071])
    draws = stochastically_rounded(x.expand(count, -1).contiguous(), generator())
    assert draws.dtype == torch.bfloat16
    nearest = x.bfloat16().float()
    # a bfloat16 has eight bits: the distance of neighbours around x
    apart = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 8)
    low = torch.where(nearest.abs() <= x.abs(), nearest, nearest - x.sign() * apart)
    high = low + x.sign() * apart
    assert ((draws == low.bfloat16()) | (draws == high.bfloat16())).all()
    up = (x - low) / (high - low)
    mean = (draws.double() - low.double()).mean(0) / (high - low).double()
    error = (up * (1 - up) / count).sqrt()
    assert ((mean - up).abs() <= 4 * error + 2**-16).all(), "in standard errors"


def test_what_a_bfloat16_holds_is_not_rounded():
    x = torch.randn(10_000, generator=generator()).bfloat16()
    special = torch.tensor([0.0, -0.0, 2.0**-120, -(2.0**-133), 1.0, -256.0]).bfloat16()
    for exact in (x, special):
        assert torch.equal(stochastically_rounded(exact.float(), generator(1)), exact)


# Many steps that are too small for a bfloat16


def test_tiny_steps_are_not_lost():
    """Take 30 steps of a thousandth of the distance to the next bfloat16."""
    steps, apart = 30, 2.0**-7
    step = {"lr": 1e-3 * apart, "betas": (0.0, 0.0), "eps": 1e-12, "weight_decay": 0.0}
    expected = -steps * step["lr"]

    def walked(rounding, count):
        weight = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
        if rounding == "nearest":
            optimizer = torch.optim.AdamW([weight], **step)
        else:
            optimizer = HalfAdamW([weight], **step, rounding=rounding)
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.data.double() - 1, optimizer.state[weight]

    assert (walked("nearest", 4)[0] == 0).all()
    moved, state = walked("kahan", 4)
    # what is kept has eight bits of its own, and loses half of its last one a step
    bound = steps * abs(expected) * 2**-9
    assert ((moved + state["lost"].double() - expected).abs() <= bound).all()
    count = 40_000
    moved, _ = walked("stochastic", count)
    error = float(moved.std()) / math.sqrt(count)
    assert abs(float(moved.mean()) - expected) <= 4 * error < 0.2 * abs(expected)


def test_kahans_weights_follow_float32_for_long():
    """After 100 steps that plain rounding would lose, the error is at most half of the last bit."""
    paths = {}
    for name, dtype in (("kahan", torch.bfloat16), ("float32", torch.float32)):
        weight = nn.Parameter(torch.linspace(1.0, 1.9, 50).bfloat16().to(dtype))
        settings = SETTINGS | {"lr": 3e-4, "weight_decay": 0.0}
        optimizer = HalfAdamW([weight], **settings, rounding="kahan")
        for _ in range(150):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        paths[name] = weight.data.float()
    assert (paths["float32"] - torch.linspace(1.0, 1.9, 50)).abs().min() > 0.03
    half_a_bit = 2**-8
    assert (paths["kahan"] - paths["float32"]).abs().max() <= 1.1 * half_a_bit


# What the bits depend on


def test_bits_follow_seed_step_and_place():
    def trained(seed=0, steps=1):
        parameters = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = HalfAdamW(parameters, **SETTINGS, rounding="stochastic", seed=seed)
        moved = []
        for _ in range(steps):
            for p in parameters:
                p.data.fill_(1.0)
                p.grad = torch.ones_like(p)
            optimizer.step()
            moved.append([p.data.clone() for p in parameters])
        return moved

    torch.manual_seed(1)
    first = trained(steps=2)
    torch.manual_seed(2)
    again = trained(steps=2)
    for one, other in zip(first, again, strict=True):
        assert all(map(torch.equal, one, other)), "the global generator has no part in it"
    assert not torch.equal(first[0][0], trained(seed=1)[0][0])
    assert not torch.equal(first[0][0], first[1][0]), "of the next step"
    assert not torch.equal(first[0][0], first[0][1]), "of the next weight"


# Going on from a file


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_saved_state_goes_on_bit_for_bit(rounding, tmp_path):
    parameters = random_weights(torch.bfloat16)
    optimizer = HalfAdamW(parameters, **SETTINGS, rounding=rounding)
    take_steps(optimizer, parameters, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    copies = [nn.Parameter(p.data.clone()) for p in parameters]
    resumed = HalfAdamW(copies, **SETTINGS, rounding=rounding)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for p, copied in zip(parameters, copies, strict=True):
        mine, other = optimizer.state[p], resumed.state[copied]
        assert mine.keys() == other.keys()
        assert ("lost" in mine) == (rounding == "kahan")
        assert other["exp_avg"].dtype == other["exp_avg_sq"].dtype == torch.float32
        for name, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name
            assert torch.as_tensor(value).dtype == torch.as_tensor(other[name]).dtype, name
    take_steps(optimizer, parameters, range(3, 6))
    take_steps(resumed, copies, range(3, 6))
    assert all(map(torch.equal, parameters, copies))
    moments = [optimizer.state[p]["exp_avg"] for p in parameters]
    assert all(map(torch.equal, moments, [resumed.state[p]["exp_avg"] for p in copies]))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_resumed_run_is_the_run_without_the_stop(rounding, tmp_path):
    options = {"critic": "head", "compute_dtype": "bfloat16", "trained_weights": rounding}
    trainer = tiny_trainer(**options)
    trainer.train_step(PROMPTS)
    path = trainer.save_checkpoint(tmp_path, 1)
    expected = without_times(trainer.train_step(PROMPTS))
    resumed = tiny_trainer(**options)
    assert resumed.load_checkpoint(path) == 1
    assert without_times(resumed.train_step(PROMPTS)) == expected
    mine, other = weights(resumed.policy_model), weights(trainer.policy_model)
    assert {w.dtype for w in mine.values()} == {torch.bfloat16}
    assert all(torch.equal(mine[name], other[name]) for name in other)
