"""Whole PPO steps of SmolLM2-135M: ours beside plain ones, and with beside without a trunk.

Responses have one length (nothing ends them), 4 epochs are 4 optimizer steps. A side's models are
its own, and go on learning from round to round.
"""

import copy

import plain_ppo
import pytest
from step_sides import Ours, of_ids
from torch import nn

from ppo_fast import ValueModel
from ppo_fast.demo_task import load_prompts

ROUNDS = 3


@pytest.fixture(scope="module")
def smollm2():
    return pytest.importorskip("ppo_fast.smollm2").load_smollm2()


def take_turns(turns, capsys, work, ours, name, theirs):
    """``theirs`` is a step, or one of Ours."""
    step = theirs.step if isinstance(theirs, Ours) else theirs
    turns(work, {"ppo_fast": ours.step, name: step}, rounds=ROUNDS, warm=False)
    show("ppo_fast", ours, capsys)
    if isinstance(theirs, Ours):
        show(name, theirs, capsys)


def show(name, side, capsys):
    total = side.spent.total()
    shares = ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in side.spent.items())
    with capsys.disabled():
        print(f"  {name}: {shares}")


def test_all_weights(turns, smollm2, capsys):
    """A value model of its own; all weights of both are trained."""
    model, tokenizer = smollm2
    prompts = load_prompts()[0][:4]
    value_models = [ValueModel(copy.deepcopy(model), 576) for _ in range(2)]
    ours = Ours(smollm2, prompts, value_models[0], learning_rate=1e-5, max_length=48)
    plain = plain_ppo.SequentialPPO(copy.deepcopy(model), value_models[1], of_ids)
    ids = tokenizer(prompts)["input_ids"]
    work = "a PPO step: batch 4, 48 new tokens, 4 epochs, all weights of policy and value model"
    take_turns(turns, capsys, work, ours, "one prompt at a time", lambda: plain.step(ids, 48))


def test_trunk_and_top(turns, smollm2, capsys):
    """The same training both ways: 4 layers of policy and value function."""
    model, _ = smollm2
    prompts, k = load_prompts()[0][:32], 4
    options = {"learning_rate": 1e-5, "max_length": 24}
    value_model = ValueModel(copy.deepcopy(model), 576)
    plain_ppo.freeze_bottom(value_model, value_model.base_model.model, k)
    value_model.value_head = nn.Linear(576, 1)  # as a top has
    trunk = Ours(smollm2, prompts, critic="top", num_layers_unfrozen=k, **options)
    whole = Ours(smollm2, prompts, value_model, freeze=k, **options)
    work = "a PPO step: batch 32, 24 new tokens, 4 epochs, k = 4, values from a top of their own"
    take_turns(turns, capsys, work, trunk, "our ordinary path, bottom frozen", whole)


def test_trunk_and_head(turns, smollm2, capsys):
    """As `make demo` trains."""
    model, tokenizer = smollm2
    prompts = load_prompts()[0][:32]
    options = {"learning_rate": 1e-4, "max_length": 24, "num_layers_unfrozen": 4}
    ours = Ours(smollm2, prompts, critic="head", **options)
    plain = plain_ppo.BatchedPPO(copy.deepcopy(model), 4, of_ids)
    ids = tokenizer(prompts)["input_ids"]
    work = "a PPO step: batch 32, 24 new tokens, 4 epochs, k = 4, a value head"
    name = "a straightforward batched step"
    take_turns(turns, capsys, work, ours, name, lambda: plain.step(ids, 24))
