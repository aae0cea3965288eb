"""compute_dtype and trained_weights: the dtypes of weights, and an unchanged algorithm."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny_batch import batch
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model, tiny_tokenizer
from tiny_trainer import (
    PROMPTS,
    changed,
    count_letters,
    tiny_value_model,
    true_logprobs,
    weights,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from ppo_fast import PPOConfig, PPOTrainer
from ppo_fast.data.tokens import position_ids
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.lora import with_lora
from ppo_fast.models.precision import WeightCopies, hold_products_in, hold_trained_weights

TOKENS = batch()
BF16, FLOAT = torch.bfloat16, torch.float32
EPS = 2.0**-8  # of bfloat16
WAYS = [
    (critic, k)
    for critic in ("head", "model", "top", "baseline")
    for k in (None, 1)
    if (critic, k) != ("top", None)
]
storage = pytest.mark.parametrize("stored", [FLOAT, BF16], ids=["float32", "bfloat16"])


def policy_of(stored=FLOAT, family="llama"):
    """Return a policy with weights that bfloat16 holds exactly; one token in 12 ends a response."""
    policy = tiny_model(family, layers=3, hidden=32).to(BF16).to(stored)
    policy.generation_config.eos_token_id = list(range(0, VOCAB_SIZE, 12))
    return policy


def trainer_of(critic="head", k=None, stored=FLOAT, *, policy=None, **options):
    settings = {
        "max_length": 6,
        "learning_rate": 1e-3,
        "num_epochs": 2,
        "compute_dtype": "bfloat16",
    }
    config = PPOConfig(critic=critic, num_layers_unfrozen=k, **settings | options)
    policy = policy_of(stored) if policy is None else policy
    value_model = tiny_value_model().to(BF16).to(stored) if critic == "model" else None
    return PPOTrainer(policy, value_model, count_letters, tiny_tokenizer(), "cpu", config=config)


def dtypes(module, *, trained):
    return {p.dtype for p in module.parameters() if p.requires_grad == trained}


# Dtypes of weights


@storage
@pytest.mark.parametrize("trained", ["float32", "stochastic", "kahan"])
def test_trained_weights_are_as_asked_and_frozen_ones_as_stored(stored, trained):
    trainer = trainer_of("top", 1, stored, trained_weights=trained)
    expected = {FLOAT if trained == "float32" else BF16}
    for module in (trainer.policy_model, trainer.critic.module.body):
        assert dtypes(module, trained=True) == expected
        assert dtypes(module, trained=False) == {stored}
    trainer.train_step(PROMPTS)
    for module in (trainer.policy_model, trainer.critic.module.body):
        assert dtypes(module, trained=True) == expected
    moments = [s["exp_avg"].dtype for s in trainer.policy_optimizer.state.values()]
    assert set(moments) == {FLOAT}


@storage
def test_the_reference_shares_the_trunk_and_has_its_own_weights_in_half_precision(stored):
    trainer = trainer_of("head", 1, stored)
    policy, reference = trainer.policy_model, trainer.reference_model
    pairs = zip(policy.named_parameters(), reference.parameters(), strict=True)
    for (name, mine), theirs in pairs:
        assert (mine is theirs) == (not mine.requires_grad), name
        if mine.requires_grad:
            assert theirs.dtype == (BF16 if theirs.dim() == 2 else FLOAT), name
            assert torch.equal(mine.to(theirs.dtype), theirs), name


def test_float64_weights_and_frozen_ones_keep_their_dtype():
    model = nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2).half(), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    hold_trained_weights(model, BF16)
    assert [layer.weight.dtype for layer in model] == [torch.float64, BF16, FLOAT]


def test_half_precision_weights_alone_are_refused():
    for trained in ("stochastic", "kahan"):
        with pytest.raises(ValueError, match="set compute_dtype='bfloat16', or use trained_wei"):
            PPOConfig(trained_weights=trained)


# The algorithm


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:critic='baseline'")
@storage
@pytest.mark.parametrize(("critic", "k"), WAYS)
def test_the_first_ratio_is_one_and_the_first_kl_zero(critic, k, stored):
    trainer = trainer_of(critic, k, stored)
    for step in range(2):
        metrics = trainer.train_step(PROMPTS)
        assert metrics["first_max_log_ratio"] <= 1e-6
        assert (abs(metrics["kl_divergence"]) <= 1e-6) == (step == 0)


@pytest.mark.parametrize("trained", ["float32", "stochastic", "kahan"])
@pytest.mark.parametrize("k", [None, 1])
def test_adapters_over_a_base_in_half_precision(trained, k):
    pytest.importorskip("peft")
    policy = with_lora(policy_of(BF16), 4, k)
    trainer = trainer_of("head", k, policy=policy, trained_weights=trained, learning_rate=1e-2)
    before = weights(policy)
    for step in range(2):
        metrics = trainer.train_step(PROMPTS)
        assert metrics["first_max_log_ratio"] <= 1e-6
        assert (abs(metrics["kl_divergence"]) <= 1e-6) == (step == 0)
    assert dtypes(policy, trained=True) == {FLOAT if trained == "float32" else BF16}
    assert dtypes(policy, trained=False) == {BF16}
    moved = changed(policy, before)
    assert moved == {name for name in before if "lora_" in name and ("layers.2" in name or not k)}


@storage
@pytest.mark.parametrize(("critic", "k"), [("head", None), ("head", 1), ("top", 1), ("model", 1)])
def test_a_step_is_nearly_that_of_float32(critic, k, stored):
    exact = trainer_of(critic, k, compute_dtype=None, num_epochs=1)
    half = trainer_of(critic, k, stored, num_epochs=1)
    rollout = replace(exact.rollout(PROMPTS), trunk_states=None, states=None)
    before = weights(exact.policy_model)
    expected, found = (t.update(t.make_experience(rollout)) for t in (exact, half))
    for name in ("policy_grad_norm", "value_loss"):
        assert found[name] == pytest.approx(expected[name], rel=EPS), name
    # Adam's first step has one size for every weight, so that small gradients count in full
    ways = [change(before, weights(t.policy_model)) for t in (exact, half)]
    assert cosine(*ways) > 0.99


def change(before, now):
    """Return the changes of all weights as one float64 vector."""
    return torch.cat([(now[name].double() - before[name].double()).flatten() for name in before])


def cosine(one, other):
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logprobs_are_as_near_the_truth_as_eager_ones(family):
    model = policy_of(family=family)
    ours = LanguageModel(model, compute_dtype=BF16)
    assert ours.fused
    found = ours.logprobs(ours.forward(TOKENS), TOKENS, temperature=0.7).logprobs
    truth = true_logprobs(model, TOKENS, 0.7)
    with torch.autocast("cpu", BF16):
        eager = LanguageModel(model)
        eager.fused = False
        logits = eager.forward(TOKENS).logits
    eager = (logits.float() / 0.7).log_softmax(-1)
    eager = eager.gather(-1, TOKENS.response_ids[..., None]).squeeze(-1)
    real = TOKENS.response_mask
    budget = 2 * (eager - truth)[real].abs().max() + 4 * EPS
    assert 0 < (found - truth)[real].abs().max() <= budget


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_half_precision_weights_follow_float32_ones(rounding):
    """At this learning rate, plain rounding would keep a fifth of the changes."""
    exact, half = (
        trainer_of(stored=BF16, trained_weights=trained, learning_rate=1e-4)
        for trained in ("float32", rounding)
    )
    rollout = replace(exact.rollout(PROMPTS), states=None)
    before = weights(exact.policy_model)
    three_times(exact, rollout)
    losses = three_times(half, rollout)
    assert losses[2] < losses[1] < losses[0]
    way = change(before, weights(exact.policy_model))
    went = change(before, weights(half.policy_model))
    assert float(went @ way / way.square().sum()) == pytest.approx(1, abs=0.1)
    lost = {
        name: half.policy_optimizer.state[p].get("lost", torch.zeros(()))
        for name, p in half.policy_model.named_parameters()
    }
    went = change(before, {n: w.double() + lost[n] for n, w in weights(half.policy_model).items()})
    assert cosine(went, way) > {"stochastic": 0.6, "kahan": 0.98}[rounding]


def three_times(trainer, rollout):
    """Return the value losses of three steps on the same rollout."""
    return [trainer.update(trainer.make_experience(rollout))["value_loss"] for _ in range(3)]


@pytest.mark.parametrize(
    ("critic", "k"), [("model", None), ("head", None), ("model", 2), ("head", 2), ("top", 2)]
)
def test_gradient_checkpointing_changes_nothing(critic, k):
    trained, runs = [], []
    for on in (False, True):
        trainer = trainer_of(critic, k, BF16, gradient_checkpointing=on)
        top, count = trainer.policy_model.model.layers[-1].mlp, [0]
        experience = trainer.make_experience(trainer.rollout(PROMPTS))
        top.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        trainer.update(experience)
        runs.append(count[0])
        trained.append(weights(trainer.policy_model) | weights(trainer.critic.module))
    assert runs[1] == 2 * runs[0] > 0
    for name, weight in trained[0].items():
        assert torch.equal(trained[1][name], weight), name


# Weights for a while


@pytest.mark.parametrize("how", ["ends", "raises"])
def test_rollouts_run_on_copies_in_half_precision(how, monkeypatch):
    trainer = trainer_of("head", 1, policy=policy_of() if how == "ends" else policy_of(BF16))
    policy = trainer.policy_model
    trainer.train_step(PROMPTS)  # weights that bfloat16 would round
    before, lie = weights(policy), [p.data_ptr() for p in policy.parameters()]
    met = []

    def note(*_):
        met.append({p.dtype for p in policy.parameters()})
        if how == "raises":
            raise RuntimeError("amid")

    handle = policy.model.norm.register_forward_pre_hook(note)
    if how == "raises":
        with pytest.raises(RuntimeError, match="amid"):
            trainer.rollout(PROMPTS)
    else:
        trainer.rollout(PROMPTS)
    handle.remove()
    assert met
    assert all(found == {BF16} for found in met)
    assert not changed(policy, before)
    assert [p.data_ptr() for p in policy.parameters()] == lie


def test_without_a_dtype_weights_are_not_copied():
    model = policy_of()
    lie = [p.data_ptr() for p in model.parameters()]
    with WeightCopies(None).in_use(model):
        assert [p.data_ptr() for p in model.parameters()] == lie


def test_tied_weights_stay_tied_in_half_precision():
    model = policy_of(family="gpt2")
    with WeightCopies(BF16).in_use(model):
        assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
        assert model.lm_head.weight.dtype == BF16


@pytest.mark.parametrize("kept", [True, False])
def test_kept_copies_are_refreshed_in_place(kept):
    model = policy_of()
    size = sum(2 * p.numel() for p in model.parameters())
    copies = WeightCopies(BF16, size if kept else size - 1)
    with copies.in_use(model):
        first = [p.data for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    with copies.in_use(model):
        for parameter, copy_ in zip(model.parameters(), first, strict=True):
            assert (parameter.data_ptr() == copy_.data_ptr()) == kept
    for parameter, copy_ in zip(model.parameters(), first, strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(copy_, parameter.to(BF16)) == kept


def test_a_copy_that_does_not_fit_is_made_anew():
    model = torch.nn.Linear(3, 4, bias=False)
    copies = WeightCopies(BF16, 2**20)
    with copies.in_use(model):
        pass
    model.weight.data = torch.ones(5, 3)
    with copies.in_use(model):
        assert torch.equal(model.weight, torch.ones(5, 3, dtype=BF16))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_weights_stored_in_half_precision_give_the_bits_of_autocast(family):
    model = tiny_model(family, hidden=32)  # weights that bfloat16 would round
    held = copy.deepcopy(model)
    hold_products_in(BF16, held, without=model)
    arguments = {
        "input_ids": TOKENS.input_ids,
        "attention_mask": TOKENS.attention_mask,
        "position_ids": position_ids(TOKENS.attention_mask),
    }
    with torch.autocast("cpu", BF16):
        expected, found = model(**arguments).logits, held(**arguments).logits
    assert torch.equal(found, expected)
    embedding, head = held.get_input_embeddings().weight, held.get_output_embeddings().weight
    assert embedding.dtype == FLOAT
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert head.dtype == (FLOAT if tied else BF16)
    layers = [m for m in held.base_model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    assert {layer.weight.dtype for layer in layers} == {BF16}


def test_weights_that_another_model_has_are_left_as_they_are():
    model = policy_of()
    shared = model.model.layers[0].mlp.up_proj.weight
    other = copy.deepcopy(model, {id(shared): shared})
    hold_products_in(BF16, other, without=model)
    assert shared.dtype == FLOAT
    assert other.model.layers[1].mlp.up_proj.weight.dtype == BF16
    assert {p.dtype for p in model.parameters()} == {FLOAT}
