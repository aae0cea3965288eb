"""train_reward_model and torch's global state: generators, the default device, infinities."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_classifier, tiny_model, tiny_tokenizer
from tiny_pairs import tiny_pairs
from tiny_trainer import changed, tiny_reward_model, weights

from ppo_fast.rewards.fit.loss import calibration, pair_metrics
from ppo_fast.rewards.fit.pairs import split
from ppo_fast.rewards.fit.settings import RewardModelConfig
from ppo_fast.rewards.fit.train import evaluate_reward_model, train_reward_model

PAIRS, OTHERS = tiny_pairs(20), tiny_pairs(8, seed=1)
TOKENIZER = tiny_tokenizer()


def fit(model, *, held_out=OTHERS, on_step=None, **settings):
    return train_reward_model(
        model,
        TOKENIZER,
        PAIRS,
        config=RewardModelConfig(**({"learning_rate": 1e-3} | settings)),
        held_out=held_out,
        on_step=on_step,
    )


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_global_generators_are_left_alone(lora_rank, monkeypatch):
    model, seeded = tiny_model(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    fit(model, lora_rank=lora_rank)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded


@pytest.mark.parametrize("make", [tiny_model, tiny_classifier, tiny_reward_model])
def test_training_does_not_depend_on_the_default_device(make):
    results = []
    for device in ("cpu", "meta"):
        model = make()
        with torch.device(device):
            results.append(fit(model, held_out=0.2, lora_rank=2))
    assert results[0].history == results[1].history
    assert not changed(results[0].model, weights(results[1].model))


def test_pairs_and_texts_do_not_depend_on_the_default_device():
    model, texts = tiny_reward_model(), (["The film", "She"], [" was over", " thought so"])
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 2.0])
    expected = (
        split(9, 0.3, seed=2),
        calibration(one, other),
        model.get_rewards(*texts, TOKENIZER, "cpu").tolist(),
    )
    with torch.device("meta"):
        found = (
            split(9, 0.3, seed=2),
            calibration(one, other),
            model.get_rewards(*texts, TOKENIZER, "cpu").tolist(),
        )
    assert found == expected


def test_equal_rewards_are_calibrated():
    """They say that either response is as good: a probability of 1/2."""
    equal = torch.zeros(6)
    assert calibration(equal, equal) == 0
    assert pair_metrics(equal, equal)["accuracy"] == 0
    assert calibration(torch.tensor([0.0, 50.0]), torch.tensor([0.0, -50.0])) == 0


def make_chosen_infinite(model):
    """Add infinity to the first half of a batch, the chosen responses; their losses are then 0."""

    def add(head, given, rewards):
        infinite = torch.zeros_like(rewards)
        infinite[: len(rewards) // 2] = math.inf
        return rewards + infinite

    model.score.register_forward_hook(add)


def test_an_infinite_reward_of_a_chosen_response_is_an_error():
    model = tiny_classifier()
    make_chosen_infinite(model)
    before = weights(model)
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is 0\.0, .* reward inf; this"):
        fit(model)
    assert not changed(model, before)
    with pytest.raises(FloatingPointError, match=r"^8 of 8 pairs have a reward or a loss that is"):
        evaluate_reward_model(model, TOKENIZER, OTHERS)


def test_held_out_infinities_leave_the_weights_that_were_evaluated():
    """The weights of the step before are not kept; the documentation says so."""
    options, stepped = {"batch_size": 20, "num_epochs": 2}, []
    bad = TOKENIZER("z")["input_ids"][0]  # of no other pair

    def unfit():
        model = tiny_classifier()
        model.model.embed_tokens.weight.data[bad] = math.nan
        return model

    good, model = unfit(), unfit()
    fit(good, on_step=lambda _: stepped.append(weights(good)), **options)
    rows = [*OTHERS, OTHERS[0] | {"chosen": "z"}]
    with pytest.raises(FloatingPointError, match="held-out pairs after step 1: 1 of 9 pairs have"):
        fit(model, held_out=rows, **options)
    model.model.embed_tokens.weight.data[bad] = 0
    stepped[0]["model.embed_tokens.weight"][bad] = 0
    assert not changed(model, stepped[0])
    assert changed(model, stepped[1])
