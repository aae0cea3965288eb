"""Rewards that are no rewards: an error that names the model, and nothing is lost."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_trainer import PROMPTS, changed, count_letters, names, one_line, tiny_trainer, weights
from torch import nn

NAN, INF = float("nan"), float("inf")


class Judge(nn.Module):
    """Returns what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, input_ids, attention_mask):
        return self.answer(input_ids)


def mostly(value):
    """A score for each prompt, ``value`` for the one about the train."""
    return lambda prompts, texts: [value if "train" in prompt else 1.0 for prompt in prompts]


def numbers(*shape):
    return Judge(lambda ids: torch.zeros(len(ids), *shape))


FUNCTION, JUDGE = r"reward_model <lambda>", r"reward_model Judge"
BAD_REWARDS = {
    "too few": (
        lambda prompts, texts: [1.0] * 4,
        ValueError,
        rf"{FUNCTION}: got shape \[4\], expected \[5\], a number a prompt",
    ),
    "too many": (lambda prompts, texts: [1.0] * 6, ValueError, r"got shape \[6\], expected \[5\]"),
    "a matrix": (
        lambda prompts, texts: torch.zeros(5, 1),
        ValueError,
        r"got shape \[5, 1\], expected \[5\]",
    ),
    "not numbers": (lambda p, t: ["good"] * 5, TypeError, rf"{FUNCTION}: expected a list of num"),
    "no list": (lambda p, t: None, TypeError, rf"{FUNCTION}: expected a list of numbers, one a p"),
    "nan": (mostly(NAN), ValueError, r"got nan for the prompt 'The train to the north'"),
    "inf": (mostly(INF), ValueError, r"got inf for the prompt 'The train to the north'"),
    "three numbers": (
        numbers(3, 2),
        ValueError,
        rf"{JUDGE} returned shape \[\d, 3, 2\] for input_ids .*; expected",
    ),
    "another batch": (
        Judge(lambda ids: torch.zeros(len(ids) + 1)),
        ValueError,
        rf"{JUDGE} returned shape \[\d\] for input_ids .*; expected",
    ),
    "a string": (Judge(lambda ids: "good"), TypeError, rf"{JUDGE} returned str, expected a tensor"),
    "a module's nan": (
        Judge(lambda ids: torch.full((len(ids),), NAN)),
        ValueError,
        rf"{JUDGE}: got nan for the prompt 'The film was'",
    ),
}


@pytest.mark.parametrize("case", BAD_REWARDS)
def test_rewards(case):
    reward, error, message = BAD_REWARDS[case]
    trainer = tiny_trainer(reward)
    policy, stats = weights(trainer.policy_model), copy.deepcopy(trainer.stats)
    with pytest.raises(error, match=message) as caught:
        trainer.train_step(PROMPTS)
    assert one_line(caught)
    assert not changed(trainer.policy_model, policy)
    assert trainer.stats == stats


@pytest.mark.parametrize("kind", ["function", "module"])
def test_a_reward_that_raises(kind):
    cause = KeyError("no such prompt")

    def fail(*arguments):
        raise cause

    trainer = tiny_trainer(fail if kind == "function" else Judge(fail))
    name = "fail" if kind == "function" else "Judge"
    with pytest.raises(RuntimeError, match=rf"reward_model {name} raised KeyError.*no such") as e:
        trainer.train_step(PROMPTS)
    assert e.value.__cause__ is cause


def test_nothing_is_lost_when_a_reward_fails(tmp_path):
    """Weights, optimizers and the checkpoint folder are as after the last good step."""
    good = tiny_trainer()
    good.train(PROMPTS, num_steps=1, batch_size=2, progress=False)
    calls = []

    def reward(prompts, texts):
        calls.append(1)
        return count_letters(prompts, texts) if len(calls) == 1 else [NAN] * len(texts)

    trainer = tiny_trainer(reward)
    with pytest.raises(ValueError, match="got nan for the prompt"):
        trainer.train(PROMPTS, num_steps=3, batch_size=2, checkpoint_dir=tmp_path, progress=False)
    assert not changed(trainer.policy_model, weights(good.policy_model))
    assert names(tmp_path) == ["ppo_checkpoint_step_1.pt"]
