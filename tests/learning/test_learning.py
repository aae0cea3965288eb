"""PPO learns: a tiny random model learns to write the token that its reward counts."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from torch import nn

from ppo_fast import PPOConfig, PPOTrainer

pytestmark = pytest.mark.slow

TARGET = 101
PROMPTS = ["The film was", "She thought the other", "There", "Nothing in this room was where"]


class CountTarget(nn.Module):
    """The number of TARGET tokens in a sequence (the prompts hold none)."""

    def forward(self, input_ids, attention_mask):
        return (input_ids == TARGET).sum(dim=1).float()


def fraction_after_training(seed, *, shuffle=False, **options):
    """Return the share of TARGET among sampled tokens after training with ``options``; ``shuffle``:
    with shuffled advantages."""
    settings = {"learning_rate": 3e-3, "critic": "head", "max_length": 12, "kl_penalty": 0.01}
    config = PPOConfig(seed=seed, **settings, **options)
    model = tiny_model("llama", seed=seed)
    trainer = PPOTrainer(model, None, CountTarget(), tiny_tokenizer(), "cpu", config=config)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(45):
        experience = trainer.make_experience(trainer.rollout(PROMPTS * 8))
        if shuffle:
            valid = experience.tokens.response_mask
            found = experience.advantages[valid]
            mixed = found[torch.randperm(len(found), generator=generator)]
            advantages = experience.advantages.masked_scatter(valid, mixed)
            experience = replace(experience, advantages=advantages)
        trainer.update(experience)
    tokens = trainer.rollout(PROMPTS * 8).tokens
    sampled = tokens.response_ids[tokens.response_mask]
    return (sampled == TARGET).float().mean().item()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_rewarded_token_becomes_frequent(seed):
    assert fraction_after_training(seed) >= 0.4


def test_it_learns_from_responses_drawn_in_int8():
    assert fraction_after_training(0, rollout_weights="int8") >= 0.4


@pytest.mark.parametrize("seed", [0, 1])
def test_a_trunk_learns_along_the_ordinary_curve(seed):
    curves = []
    for k in (1, None):
        # in float32 rounding grows until, some ten steps on, it changes a draw
        policy = tiny_model("llama", layers=3, seed=seed).double()
        if k is None:  # the same training with every layer computed in every pass
            policy.requires_grad_(False)
            for module in (*policy.model.layers[-1:], policy.model.norm, policy.lm_head):
                module.requires_grad_(True)
        config = PPOConfig(
            learning_rate=3e-3, critic="head", max_length=12, kl_penalty=0.01, seed=seed,
            num_layers_unfrozen=k,
        )  # fmt: skip
        trainer = PPOTrainer(policy, None, CountTarget(), tiny_tokenizer(), "cpu", config=config)
        steps = [trainer.train_step(PROMPTS * 8) for _ in range(16)]
        curves.append([(m["mean_reward"], m["kl_sequence"], m["value_loss"]) for m in steps])
    trunk_states, ordinary = torch.tensor(curves)
    torch.testing.assert_close(trunk_states, ordinary, rtol=1e-4, atol=1e-5)
    assert trunk_states[-3:, 0].mean() > 3 * trunk_states[:3, 0].mean(), "it learned"


def test_shuffled_advantages_do_not_learn():
    # the control: learning in the test above is due to the advantages
    assert fraction_after_training(0, shuffle=True) < 0.1
