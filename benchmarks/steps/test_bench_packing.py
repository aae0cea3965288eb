"""Experience and update of SmolLM2-135M in packed passes, against padded ones.

A step's tokens are random ids, so that nothing is decoded. Before each work, a line says how many
tokens its passes have, packed and padded.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch

from ppo_fast import PPO, PPOConfig, Rollout, ValueModel
from ppo_fast.data.batches import batches_of

ROUNDS = 3
MICROBATCH_TOKENS = 4096


class Work(NamedTuple):
    """Lengths of the sequences of a step, from the shortest to the longest, drawn evenly.

    prompts: their number.
    samples: responses to each.
    """

    prompts: int
    samples: int
    prompt_lengths: tuple[int, int]
    response_lengths: tuple[int, int]
    critic: str


WORKS = {
    "8 samples of each of 4 prompts of 512 tokens, 128 new, a value head": Work(
        4, 8, (512, 512), (128, 128), "head"
    ),
    "prompts of 8 to 256 tokens, responses of 8 to 128, a value model": Work(
        32, 1, (8, 256), (8, 128), "model"
    ),
}


def rollout_of(work: Work) -> Rollout:
    generator = torch.Generator().manual_seed(0)

    def ids(lengths: tuple[int, int]) -> list[int]:
        count = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=generator))
        return torch.randint(100, 40_000, (count,), generator=generator).tolist()

    prompts = [p for _ in range(work.prompts) for p in [ids(work.prompt_lengths)] * work.samples]
    responses = [ids(work.response_lengths) for _ in prompts]
    logprobs = [[-5.0] * len(response) for response in responses]
    rollout = Rollout.from_tokens(prompts, responses, logprobs=logprobs)
    texts = [""] * len(prompts)
    return replace(rollout, prompts=texts, completions=texts, samples_per_prompt=work.samples)


def no_scores(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.0] * len(prompts)


def make_ppo(smollm2, work: Work, *, padding_free: bool) -> PPO:
    model, tokenizer = smollm2
    value_model = ValueModel(copy.deepcopy(model), 576) if work.critic == "model" else None
    config = PPOConfig(
        critic=work.critic,
        learning_rate=1e-6,
        num_epochs=1,
        max_length=work.response_lengths[1],
        samples_per_prompt=work.samples,
        microbatch_tokens=MICROBATCH_TOKENS,
        padding_free=padding_free,
    )
    policy = copy.deepcopy(model)
    return PPO(policy, tokenizer, no_scores, value_model=value_model, config=config)


@pytest.fixture(scope="module")
def smollm2():
    return pytest.importorskip("ppo_fast.demo.smollm2").load_smollm2()


@pytest.mark.parametrize("part", ["experience", "update"])
@pytest.mark.parametrize("name", WORKS)
def test_packing(turns, smollm2, capsys, name, part):
    work = WORKS[name]
    rollout = rollout_of(work)
    tokens = rollout.tokens
    sides = {
        side: make_ppo(smollm2, work, padding_free=free)
        for side, free in (("ppo_fast", True), ("with padding", False))
    }
    batches = batches_of(tokens, MICROBATCH_TOKENS, packed=False)
    padded = sum(len(rows) * int(tokens.lengths[rows].max()) for rows in batches)
    with capsys.disabled():
        print(
            f"\n  {name}: {len(tokens.packing)} tokens packed, {int(tokens.lengths.sum())} "
            f"without sharing, {padded} padded"
        )
    if part == "experience":
        steps = {s: partial(ppo.make_experience, rollout) for s, ppo in sides.items()}
    else:
        steps = {s: partial(ppo.update, ppo.make_experience(rollout)) for s, ppo in sides.items()}
    turns(f"{part}: {name}", steps, rounds=ROUNDS, warm=False)
