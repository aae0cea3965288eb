"""The learning gate: after a short supervised start, PPO teaches a tiny model a task.

The task is to write each digit of the prompt increased by one. Faults that leave every number
finite and plausible must keep the model from learning it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ppo_fast import PPO, PPOConfig
from ppo_fast.data.experience import Experience
from ppo_fast.data.tokens import Tokens
from ppo_fast.ops import gae, whiten

pytestmark = pytest.mark.slow

DIGITS, PAD, EOS = 10, 10, 11
LENGTH, BATCH, STEPS = 3, 96, 80
LEARNED, NOT_LEARNED = 0.85, 0.6  # share of right digits; it starts below 0.5


def prompts_of(count: int, seed: int) -> Tensor:
    return torch.randint(DIGITS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


@cache
def started() -> dict[str, Tensor]:
    """The weights after a supervised start that stops early."""
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(22):
        prompts = prompts_of(128, 1000 + step)
        answers = (prompts + 1) % DIGITS
        ids = torch.cat([prompts, answers], dim=1)
        labels = torch.cat([torch.full_like(prompts, -100), answers], dim=1)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, bos_token_id=None, eos_token_id=EOS,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def digits_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {str(digit): digit for digit in range(DIGITS)} | {"<pad>": PAD, "<eos>": EOS}
    model = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")


def share_of_right_digits(tokens: Tokens) -> Tensor:
    found = torch.full((len(tokens), LENGTH), -1)
    found[:, : tokens.response_ids.shape[1]] = tokens.response_ids
    return (found == (tokens.prompt_ids + 1) % DIGITS).float().mean(1)


def learned(seed: int, fault: Callable[[Experience], Experience] | None, **settings: Any) -> float:
    """Return the share of right digits after training on experience with a fault."""
    model = new_model()
    model.load_state_dict(started())
    options = {"critic": "head", "learning_rate": 1e-3, "value_learning_rate": 1e-2}
    options |= {"max_length": LENGTH, "seed": seed}
    config = PPOConfig(**options | settings)
    ppo = PPO(model, digits_tokenizer(), lambda prompts, texts: [], config=config)
    torch.manual_seed(seed)
    for step in range(STEPS):
        count = BATCH // config.samples_per_prompt
        prompts = prompts_of(count, 100 * seed + step).tolist()
        rollout = ppo.rollout(prompts, samples_per_prompt=config.samples_per_prompt)
        experience = ppo.make_experience(rollout, share_of_right_digits(rollout.tokens))
        ppo.update(experience if fault is None else fault(experience))
    tokens = ppo.rollout(prompts_of(256, 5).tolist()).tokens
    return float(share_of_right_digits(tokens).mean())


def shuffled_advantages(experience: Experience) -> Experience:
    valid = experience.tokens.response_mask
    found = experience.advantages[valid]
    mixed = found[torch.randperm(len(found))]
    return replace(experience, advantages=experience.advantages.masked_scatter(valid, mixed))


def values_that_leak_the_outcome(experience: Experience) -> Experience:
    mask = experience.tokens.response_mask
    values = torch.where(mask, experience.scores[:, None], 0.0)
    found = gae(experience.rewards, values, mask=mask, gamma=1.0, lam=0.95)
    return replace(experience, advantages=whiten(found.advantages, mask=mask))


def old_logprobs_of_the_token_before(experience: Experience) -> Experience:
    return replace(experience, old_logprobs=experience.old_logprobs.roll(1, dims=1))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns(seed):
    assert learned(seed, None) >= LEARNED


@pytest.mark.parametrize(
    "fault",
    [shuffled_advantages, values_that_leak_the_outcome, old_logprobs_of_the_token_before],
)
def test_a_fault_keeps_it_from_learning(fault):
    assert learned(0, fault) <= NOT_LEARNED
