"""Weights and optimizer states that rest in host memory: same results, and where they are when.

There is no GPU here: for these tests the CPU counts as a device whose memory is not the host's, so
that whatever moves is copied, and its address tells where it is.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_classifier, tiny_model, tiny_tokenizer
from tiny_trainer import (
    PROMPTS,
    changed,
    count_letters,
    tiny_reward_model,
    tiny_trainer,
    weights,
    without_times,
)

from ppo_fast import ClassifierReward, PPOConfig, PPOTrainer, RewardModel
from ppo_fast.learning.streamed import StreamedStates
from ppo_fast.models import offload
from ppo_fast.models.lora import with_lora
from ppo_fast.models.offload import Resting, own_tensors
from ppo_fast.nonfinite import NotFiniteError
from ppo_fast.rewards import YesNoJudge

ALL = ("optimizer", "reference", "reward")
HALF = {"compute_dtype": "bfloat16"}


@pytest.fixture
def moved(monkeypatch):
    """Let the CPU count as a device whose memory is not the host's."""
    monkeypatch.setattr(offload, "MOVED", offload.MOVED | {"cpu"})
    monkeypatch.setattr("ppo_fast.learning.streamed.MOVED", offload.MOVED)


def places(tensors):
    return [tensor.data_ptr() for tensor in tensors]


def of_state(optimizer):
    """The moments of an optimizer."""
    states = optimizer.state.values()
    return [v for s in states for v in s.values() if torch.is_tensor(v) and v.numel() > 1]


def watched(model, tensors, home):
    """Note for each pass of a module that holds one of ``tensors`` whether they are away."""
    seen = []
    owners = [m for m in model.modules() if any(p is t for p in m.parameters() for t in tensors)]
    for module in owners:
        module.register_forward_pre_hook(
            lambda *_: seen.append(not set(places(tensors)) & set(home))
        )
    return seen


# What rests


def test_tensors_rest_and_come_back(moved):
    model = tiny_model()
    tensors, before = [*model.parameters()], weights(model)
    first = places(tensors)
    resting = Resting(tensors)
    home = places(tensors)
    assert not set(home) & set(first), "the copy on the device is gone"
    assert resting.nbytes == sum(t.nbytes for t in tensors)
    with resting.resident():
        inside = places(tensors)
        assert not set(inside) & set(home)
        with resting.resident():
            assert places(tensors) == inside
        assert places(tensors) == inside, "the outer block goes on"
        assert changed(model, before) == set()
    assert places(tensors) == home
    assert [*model.parameters()] == tensors, "the same objects"
    with pytest.raises(KeyError), resting.resident():
        raise KeyError
    assert places(tensors) == home
    assert changed(model, before) == set()


def test_nothing_moves_on_the_cpu():
    trainer = tiny_trainer(tiny_reward_model(), offload=ALL)
    models = [trainer.policy_model, trainer.reference_model, trainer.reward_model]
    before = [places(model.parameters()) for model in models]
    trainer.step(PROMPTS)
    moments = places(of_state(trainer.policy_optimizer))
    trainer.step(PROMPTS)
    assert [places(model.parameters()) for model in models] == before
    assert places(of_state(trainer.policy_optimizer)) == moments
    assert trainer.reference.resting.nbytes == 0


def test_a_reference_moves_only_what_is_its_own(moved):
    trainer = tiny_trainer(critic="head", layers=3, num_layers_unfrozen=1, offload=("reference",))
    policy, reference = trainer.policy_model, trainer.reference_model
    shared = {*policy.parameters()} & {*reference.parameters()}
    own = [p for p in reference.parameters() if p not in shared]
    assert shared
    assert own
    assert set(map(id, own_tensors(reference, policy))) >= set(map(id, own))
    mine = own_tensors(reference, policy)
    assert trainer.reference.resting.nbytes == sum(t.nbytes for t in mine)
    home, there = places(own), places(shared)
    seen = watched(reference, own, home)
    trainer.step(PROMPTS)
    assert seen
    assert all(seen)
    assert places(own) == home
    assert places(shared) == there
    seen.clear()
    responses = trainer.last_rollout.completions
    trainer.get_reference_logprobs(PROMPTS, responses)
    assert seen
    assert all(seen)


def test_a_new_adapters_reference_is_the_policy_and_does_not_move(moved):
    policy = with_lora(tiny_model(), 4)
    config = PPOConfig(critic="head", max_length=6, offload=ALL)
    trainer = PPOTrainer(policy, None, count_letters, tiny_tokenizer(), "cpu", config=config)
    weights_there = places(trainer.reference_model.parameters())
    buffers = sum(b.nbytes for b in trainer.reference_model.buffers())
    assert trainer.reference.resting.nbytes <= buffers
    trainer.step(PROMPTS)
    assert places(trainer.reference_model.parameters()) == weights_there


@pytest.mark.parametrize("kind", ["model", "classifier", "pair"])
def test_reward_models_are_on_their_device_while_they_score(moved, kind):
    model = tiny_reward_model() if kind == "model" else tiny_classifier()
    reward = ClassifierReward(model, tiny_tokenizer()) if kind == "pair" else model
    trainer = tiny_trainer([reward, count_letters], critic="head", offload=("reward",))
    own = [*model.parameters()]
    home = places(own)
    seen = watched(model, own, home)
    trainer.step(PROMPTS)
    assert seen
    assert all(seen)
    assert places(own) == home


def test_a_reward_on_the_policys_trunk_moves_its_top_alone(moved):
    options = {"critic": "head", "layers": 3, "num_layers_unfrozen": 1}

    def trainer_of(**more):
        base = tiny_model(layers=3, hidden=32)
        torch.manual_seed(3)
        return tiny_trainer(RewardModel(base, 32), **options, **more)

    plain, resting = trainer_of(), trainer_of(offload=("reward", "reference"))
    assert resting.scorer.reads_trunk
    trunk = {*resting.policy_model.parameters()} & {*resting.reward_model.parameters()}
    assert trunk
    there = places(trunk)
    own = own_tensors(resting.reward_model, resting.policy_model)
    assert resting.scorer._resting.nbytes == sum(t.nbytes for t in own)
    for _ in range(2):
        a, b = plain.step(PROMPTS), resting.step(PROMPTS)
        assert without_times(a.metrics) == without_times(b.metrics)
    assert places(trunk) == there


def test_a_judge_that_asks_the_reference_finds_it_on_its_device(moved):
    judge = YesNoJudge("Is this polite? {completion}")
    trainer = tiny_trainer(judge, critic="head", offload=("reference",))
    own = [*trainer.reference_model.parameters()]
    home = places(own)
    seen = watched(trainer.reference_model, own, home)
    rollout = trainer.rollout(PROMPTS)
    trainer.score(rollout)
    assert seen
    assert all(seen)
    assert places(own) == home


# Same results

WAYS = {
    "model": {"critic": "model"},
    "head": {"critic": "head"},
    "top": {"critic": "top", "layers": 3, "num_layers_unfrozen": 1},
    "decay": {"critic": "head", "weight_decay": 0.1},
    "foreach": {"critic": "model", "adamw": "foreach", "num_minibatches": 2},
    "kahan": {"critic": "head", "trained_weights": "kahan"} | HALF,
    "stochastic": {"critic": "model", "trained_weights": "stochastic"} | HALF,
}


def pair(**options):
    """Trainers with and without offload, the first with pieces of one weight."""
    resting, plain = (
        tiny_trainer(tiny_reward_model(), **options, **more) for more in ({"offload": ALL}, {})
    )
    resting.learner.states.piece_bytes = 1
    return resting, plain


def assert_same(one, other):
    for a, b in (
        (one.policy_model, other.policy_model),
        (one.reference_model, other.reference_model),
        (one.critic.module, other.critic.module),
    ):
        assert changed(a, weights(b)) == set()
    for name, optimizer in one.learner.optimizers.items():
        theirs = other.learner.optimizers[name].state_dict()["state"]
        for index, state in optimizer.state_dict()["state"].items():
            for entry, value in state.items():
                if torch.is_tensor(value):
                    assert value.dtype == theirs[index][entry].dtype
                    assert torch.equal(value, theirs[index][entry]), (name, index, entry)
                else:
                    assert value == theirs[index][entry]


@pytest.mark.parametrize("way", WAYS)
def test_steps_are_bit_for_bit_those_without(moved, way):
    resting, plain = pair(**WAYS[way])
    for _ in range(2):
        a, b = resting.step(PROMPTS), plain.step(PROMPTS)
        assert without_times(a.metrics) == without_times(b.metrics)
    assert_same(resting, plain)


def test_states_come_in_pieces(moved):
    trainer = tiny_trainer(critic="head", offload=("optimizer",))
    optimizer = trainer.policy_optimizer
    trainer.step(PROMPTS)
    every = [w for group in optimizer.param_groups for w in group["params"]]
    trainer.learner.states.piece_bytes = 2**12
    home, pieces = places(of_state(optimizer)), []

    def note(*_):
        away = 0
        for weight in every:
            state = optimizer.state[weight]
            resting = state["exp_avg"].data_ptr() in home
            assert resting == (weight.grad is None)
            assert (state["exp_avg_sq"].data_ptr() in home) == resting
            away += 0 if resting else 8 * weight.numel()
        pieces.append(away)

    handle = optimizer.register_step_pre_hook(note)
    trainer.step(PROMPTS)
    handle.remove()
    assert len(pieces) > 4
    largest = 8 * max(weight.numel() for weight in every)
    assert max(pieces) <= max(2**12, largest)
    assert sum(pieces) == 2 * 8 * sum(w.numel() for w in every), "two epochs"
    assert places(of_state(optimizer)) == home, "in the memory that they had"


def test_a_step_that_raises_leaves_gradients_and_states_in_their_places(moved):
    trainer = tiny_trainer(critic="head", offload=("optimizer",))
    trainer.step(PROMPTS)
    optimizer, states = trainer.policy_optimizer, StreamedStates(on=True, piece_bytes=1)
    every = [w for group in optimizer.param_groups for w in group["params"]]
    for weight in every:
        weight.grad = torch.ones_like(weight)
    given = [weight.grad for weight in every]
    states.step(optimizer)
    home, calls = places(of_state(optimizer)), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        states.step(optimizer)
    handle.remove()
    assert all(w.grad is g for w, g in zip(every, given, strict=True))
    assert places(of_state(optimizer)) == home


# Checkpoints and undo


@pytest.mark.parametrize("way", ["top", "decay", "foreach", "kahan"])
@pytest.mark.parametrize(("writes", "reads"), [(ALL, ALL), ((), ALL), (ALL, ())])
def test_checkpoints(moved, tmp_path, way, writes, reads):
    options = WAYS[way]
    first, plain = tiny_trainer(**options, offload=writes), tiny_trainer(**options)
    for trainer in (first, plain):
        trainer.step(PROMPTS)
    path = first.save_checkpoint(tmp_path, 1)
    second = tiny_trainer(**options, offload=reads)
    second.learner.states.piece_bytes = 2**12
    second.load_checkpoint(path)
    if reads:
        assert all(t.device.type == "cpu" for t in of_state(second.policy_optimizer))
    assert_same(second, first)
    for trainer in (second, plain):
        trainer.step(PROMPTS)
    assert_same(second, plain)


def test_loaded_states_stay_in_host_memory_until_a_step(moved, tmp_path, monkeypatch):
    first = tiny_trainer(critic="model", offload=("optimizer",))
    first.step(PROMPTS)
    path = first.save_checkpoint(tmp_path, 1)
    second = tiny_trainer(critic="model", offload=("optimizer",))
    copies = []
    real = torch.optim.Optimizer._process_value_according_to_param_policy
    monkeypatch.setattr(
        torch.optim.Optimizer,
        "_process_value_according_to_param_policy",
        staticmethod(lambda *args, **named: copies.append(args) or real(*args, **named)),
    )
    second.load_checkpoint(path)
    assert copies == [], "torch would copy each to its weight's device"
    assert of_state(second.policy_optimizer)


def test_an_update_that_ends_in_nan_is_undone(moved):
    resting, plain = pair(critic="model", undo_updates=True)
    for trainer in (resting, plain):
        trainer.step(PROMPTS)
        rollout = trainer.rollout(PROMPTS, seeds=torch.arange(len(PROMPTS)))
        experience = trainer.make_experience(rollout)
        real, calls = trainer.learner._value_loss, []

        def at_last(*args, real=real, calls=calls):
            calls.append(1)
            return real(*args) * (float("nan") if len(calls) == 2 else 1.0)

        trainer.learner._value_loss = at_last
        with pytest.raises(NotFiniteError, match="The update was undone"):
            trainer.learner.update(experience, policy_epochs=2, value_epochs=2, seed=0)
        trainer.learner._value_loss = real
    assert_same(resting, plain)
    for trainer in (resting, plain):
        trainer.step(PROMPTS)
    assert_same(resting, plain)
