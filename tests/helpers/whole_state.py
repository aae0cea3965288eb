"""All that a checkpoint restores, in a form that can be compared."""

from __future__ import annotations

import random

import numpy as np
import torch
from tiny_trainer import PROMPTS, count_letters, tiny_trainer, weights


def noisy_reward(prompts, completions):
    """A reward that draws from every random generator that a user's reward may use."""
    noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
    return [score + noise for score in count_letters(prompts, completions)]


def flat(state):
    """The state of an optimizer as plain comparable values."""
    numbers = {
        (index, name): value.clone() if isinstance(value, torch.Tensor) else value
        for index, entry in state["state"].items()
        for name, value in entry.items()
    }
    return numbers, state["param_groups"]


def same(a, b):
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    return all(torch.equal(torch.as_tensor(a[0][k]), torch.as_tensor(b[0][k])) for k in a[0])


def everything(trainer):
    """Return all that a checkpoint restores, in a form that can be compared."""
    return {
        "policy": weights(trainer.policy_model),
        "value": weights(trainer.critic.module),
        "policy_optimizer": flat(trainer.policy_optimizer.state_dict()),
        "value_optimizer": trainer.value_optimizer and flat(trainer.value_optimizer.state_dict()),
        "stats": dict(trainer.stats),
        "random": (random.getstate(), torch.get_rng_state(), np.random.get_state()),  # noqa: NPY002
    }


def assert_is(trainer, state):
    """The trainer, and the generators, are bit for bit what ``state`` holds."""
    now = everything(trainer)
    assert now["stats"] == state["stats"]
    for name in ("policy", "value"):
        if state[name] is not None:
            assert now[name].keys() == state[name].keys()
            assert all(torch.equal(now[name][k], state[name][k]) for k in now[name])
    for name in ("policy_optimizer", "value_optimizer"):
        if state[name] is not None:
            assert same(now[name], state[name])
    python, torch_state, numpy_state = state["random"]
    assert now["random"][0] == python
    assert torch.equal(now["random"][1], torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(now["random"][2], numpy_state, strict=True))


def trained(steps=1, **options):
    trainer = tiny_trainer(noisy_reward, **options)
    for _ in range(steps):
        trainer.train_step(PROMPTS)
    return trainer
