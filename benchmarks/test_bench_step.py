"""Whole PPO steps of SmolLM2-135M: ours beside plain ones, and with beside without a trunk.

Responses have one length (nothing ends them), 4 epochs are 4 optimizer steps. A side's models are
its own, and go on learning from round to round.
"""

import copy
from collections import Counter

import plain_ppo
import pytest
from torch import nn

from ppo_fast import PPOConfig, PPOTrainer, ValueModel
from ppo_fast.critic import ValueHead
from ppo_fast.demo_task import load_prompts
from ppo_fast.tokens import position_ids

ROUNDS = 3
PARTS = ("rollout", "experience", "update")


@pytest.fixture(scope="module")
def smollm2():
    return pytest.importorskip("ppo_fast.smollm2").load_smollm2()


def of_ids(responses):
    """A score that costs nothing."""
    return [sum(ids) % 97 / 50 for ids in responses]


def of_texts(prompts, completions):
    return [len(text) % 97 / 50 for text in completions]


class Ours:
    """Steps of a PPOTrainer; ``spent`` adds up the seconds of their parts."""

    def __init__(self, smollm2, value_model=None, freeze=0, **options):
        model, tokenizer = smollm2
        policy = copy.deepcopy(model)
        if freeze:
            plain_ppo.freeze_bottom(policy, policy.model, freeze)
        self.trainer = PPOTrainer(
            policy, value_model, of_texts, tokenizer, "cpu", config=PPOConfig(**options)
        )
        self.trainer.engine.eos_ids = list
        self.spent: Counter[str] = Counter()

    def step(self, prompts):
        metrics = self.trainer.train_step(prompts)
        self.spent += {part: metrics[f"time/{part}"] for part in PARTS}

    def show(self, name, capsys):
        total = self.spent.total()
        with capsys.disabled():
            shares = ", ".join(f"{part} {t / total:.0%}" for part, t in self.spent.items())
            print(f"  {name}: {shares}")


def test_all_weights(turns, smollm2, capsys):
    """A value model of its own; all weights of both are trained."""
    model, tokenizer = smollm2
    prompts = load_prompts()[0][:4]
    value_model = ValueModel(copy.deepcopy(model), 576)
    ours = Ours(smollm2, value_model, learning_rate=1e-5, max_length=48)
    theirs = plain_ppo.SequentialPPO(
        copy.deepcopy(model), ValueModel(copy.deepcopy(model), 576), of_ids
    )
    ids = tokenizer(prompts)["input_ids"]
    work = "a PPO step: batch 4, 48 new tokens, 4 epochs, all weights of policy and value model"
    sides = {
        "ppo_fast": lambda: ours.step(prompts),
        "one prompt at a time": lambda: theirs.step(ids, 48),
    }
    turns(work, sides, rounds=ROUNDS, warm=False)
    ours.show("ppo_fast", capsys)


class WholeValue(nn.Module):
    """Values from every layer of a body whose lower ones are frozen."""

    def __init__(self, model, k):
        super().__init__()
        self.body, self.head = copy.deepcopy(model.model), ValueHead(576)
        plain_ppo.freeze_bottom(self.body, self.body, k)

    def forward(self, input_ids, attention_mask):
        places = position_ids(attention_mask)
        out = self.body(input_ids, attention_mask, position_ids=places, use_cache=False)
        return self.head(out.last_hidden_state)


def test_trunk_and_top(turns, smollm2, capsys):
    """The same training both ways: 4 layers of policy and value function."""
    model, _ = smollm2
    prompts, k = load_prompts()[0][:32], 4
    options = {"learning_rate": 1e-5, "max_length": 24}
    trunk = Ours(smollm2, critic="top", num_layers_unfrozen=k, **options)
    whole = Ours(smollm2, WholeValue(model, k), freeze=k, **options)
    work = "a PPO step: batch 32, 24 new tokens, 4 epochs, k = 4, values from a top of their own"
    sides = {
        "ppo_fast, critic='top'": lambda: trunk.step(prompts),
        "our ordinary path, bottom frozen": lambda: whole.step(prompts),
    }
    turns(work, sides, rounds=ROUNDS, warm=False)
    trunk.show("ppo_fast, critic='top'", capsys)
    whole.show("our ordinary path", capsys)


def test_trunk_and_head(turns, smollm2, capsys):
    """As `make demo` trains."""
    model, tokenizer = smollm2
    prompts = load_prompts()[0][:32]
    options = {"learning_rate": 1e-4, "max_length": 24, "num_layers_unfrozen": 4}
    ours = Ours(smollm2, critic="head", **options)
    theirs = plain_ppo.BatchedPPO(copy.deepcopy(model), 4, of_ids)
    ids = tokenizer(prompts)["input_ids"]
    work = "a PPO step: batch 32, 24 new tokens, 4 epochs, k = 4, a value head"
    sides = {
        "ppo_fast": lambda: ours.step(prompts),
        "a straightforward batched step": lambda: theirs.step(ids, 24),
    }
    turns(work, sides, rounds=ROUNDS, warm=False)
    ours.show("ppo_fast", capsys)
