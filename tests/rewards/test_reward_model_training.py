"""train_reward_model: what it learns, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from reward_fits import OTHERS, PAIRS, TOKENIZER, fit, reward_model, slow
from tiny_models import tiny_classifier, tiny_model
from tiny_trainer import changed, weights

from ppo_fast.models.adapters import adapted_layers
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.setup import put_on_trunk
from ppo_fast.rewards.fit.loss import calibration, pair_losses, pair_metrics
from ppo_fast.rewards.fit.train import evaluate_reward_model

# What it learns


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        pytest.param(tiny_model, {}, id="llama"),
        pytest.param(reward_model, {}, id="RewardModel"),
        pytest.param(tiny_classifier, {}, id="classifier", marks=slow),
        pytest.param(lambda: tiny_model("gpt2"), {}, id="gpt2", marks=slow),
        pytest.param(
            lambda: tiny_classifier("qwen2"),
            {"lora_rank": 4, "learning_rate": 1e-2},
            id="lora",
            marks=slow,
        ),
        pytest.param(
            reward_model,
            {"num_layers_unfrozen": 1, "compute_dtype": "bfloat16"},
            id="top in bfloat16",
            marks=slow,
        ),
    ],
)
def test_separable_pairs_are_told_apart(make, settings):
    result = fit(make(), held_out=OTHERS, num_epochs=2, **settings)
    assert result.evaluation["accuracy"] >= 0.95
    assert result.evaluation["loss"] < 0.2 < result.history[0]["loss"]
    assert result.evaluation["calibration"] < 0.15
    assert result.evaluation["margin"] > 2
    last = {n.removeprefix("held_out/"): v for n, v in result.history[-1].items() if "/" in n}
    assert last == result.evaluation
    assert all(
        type(value) in (int, float) for metrics in result.history for value in metrics.values()
    )
    assert not result.model.training


def test_the_loss_is_the_formula_in_float64():
    """Rewards of the model's own pass, a text at a time and without padding."""
    model = tiny_classifier("qwen2").double()
    rows = [row | {"margin": i / 7} for i, row in enumerate(PAIRS[:5])]
    expected = {"loss": [], "difference": []}
    for row in rows:
        chosen, rejected = (
            model(**TOKENIZER(row["prompt"] + row[side], return_tensors="pt")).logits.item()
            for side in ("chosen", "rejected")
        )
        log_sigmoid = -math.log1p(math.exp(-(chosen - rejected - row["margin"])))
        expected["loss"].append(-log_sigmoid + 0.3 * (chosen + rejected) ** 2)
        expected["difference"].append(chosen - rejected)
    result = fit(model, rows, batch_size=5, use_margin=True, centering=0.3, microbatch_tokens=40)
    (metrics,) = result.history
    assert metrics["loss"] == pytest.approx(sum(expected["loss"]) / 5, rel=1e-5)
    assert metrics["margin"] == pytest.approx(sum(expected["difference"]) / 5, rel=1e-5)
    assert metrics["accuracy"] == sum(d > 0 for d in expected["difference"]) / 5


def test_the_gradient_is_that_of_the_mean_loss():
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64)
    margins = torch.rand(6, dtype=torch.float64)
    chosen.requires_grad_()
    pair_losses(chosen, rejected, margins).mean().backward()
    expected = -(1 - (chosen - rejected - margins).sigmoid()) / 6
    torch.testing.assert_close(chosen.grad, expected.detach())
    far = pair_losses(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert float(far) == 2e4, "no overflow"


def test_metrics_by_hand():
    """Confidences 0.731, 0.731, 0.881 and 0.5; the second is wrong, and the tie is half right."""
    chosen, rejected = torch.tensor([2.0, 0.0, 1.0, 3.0]), torch.tensor([1.0, 1.0, -1.0, 3.0])
    found = pair_metrics(chosen, rejected)
    rewards = torch.cat([chosen, rejected])
    assert found == {
        "accuracy": 0.5,
        "margin": 0.5,
        "reward_mean": 1.25,
        "reward_std": pytest.approx(float(rewards.std(correction=0))),
    }
    p1, p2 = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    by_hand = (abs(0.5 - p1) * 2 + (1 - p2) + 0) / 4  # bins (0.7, 0.8], (0.8, 0.9], (0.4, 0.5]
    assert calibration(chosen, rejected) == pytest.approx(by_hand)
    sure = torch.full((3,), 100.0)
    assert calibration(sure, -sure) == 0
    assert calibration(-sure, sure) == 1


def test_microbatches_change_rounding_alone():
    runs = [
        fit(tiny_classifier("qwen2"), PAIRS[:48], batch_size=12, microbatch_tokens=tokens)
        for tokens in (1, 150, 100_000)
    ]
    for other in runs[1:]:
        for one, two in zip(runs[0].history, other.history, strict=True):
            assert one == pytest.approx(two, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize(
    ("make", "settings"),
    [(tiny_model, {}), (tiny_model, {"lora_rank": 2}), (tiny_classifier, {})],
    ids=["head", "adapters", "order of pairs"],
)
def test_equal_seeds_give_equal_weights(make, settings):
    models = []
    for chance, seed in enumerate((3, 3, 4)):
        torch.manual_seed(chance)  # what torch draws elsewhere has no part in it
        models.append(fit(make(), PAIRS[:30], seed=seed, **settings).model)
    assert not changed(models[0], weights(models[1]))
    assert changed(models[0], weights(models[2]))


def test_the_rate_warms_up_and_decays():
    history = fit(tiny_classifier(), PAIRS[:40], batch_size=10, lr_warmup=0.5, num_epochs=2).history
    rates = [metrics["learning_rate"] / 3e-3 for metrics in history]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25])
    assert [metrics["epoch"] for metrics in history][3::4] == [1, 2]


def test_margins_and_centring_change_what_is_learned():
    rows = [row | {"margin": 3.0} for row in PAIRS]
    plain = fit(tiny_classifier(), rows, held_out=OTHERS)
    wide = fit(
        tiny_classifier(), rows, held_out=[r | {"margin": 3.0} for r in OTHERS], use_margin=True
    )
    assert wide.evaluation["margin"] > plain.evaluation["margin"] + 0.5
    means = []
    for centering in (0.0, 0.1):
        model = reward_model()
        model.reward_head[3].bias.data.fill_(10.0)
        means.append(fit(model, held_out=OTHERS, num_epochs=2, centering=centering).evaluation)
    assert abs(means[1]["reward_mean"]) < 2 < 8 < means[0]["reward_mean"]


# What it leaves alone


def test_a_causal_lm_is_copied():
    policy = tiny_model()
    before = weights(policy)
    result = fit(policy, PAIRS[:20])
    assert not changed(policy, before)
    assert type(result.model).__name__ == "LlamaForSequenceClassification"
    classifier = tiny_classifier()
    assert fit(classifier, PAIRS[:20]).model is classifier


@pytest.mark.parametrize("make", [tiny_classifier, reward_model])
def test_adapters_are_merged_into_a_plain_model(make):
    model = make()
    before = weights(model)
    result = fit(model, PAIRS[:30], held_out=OTHERS, lora_rank=2, learning_rate=1e-2)
    assert result.model is model
    assert not adapted_layers(model)
    names = changed(model, before)  # also says that the names are those of before
    assert any("q_proj" in name for name in names)
    assert any("head" in name or "score" in name for name in names)
    assert not any("norm" in name or "embed" in name or "lm_head" in name for name in names)
    merged = evaluate_reward_model(model, TOKENIZER, OTHERS)
    assert merged == pytest.approx(result.evaluation, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_frozen_trunk_is_shared_with_the_policy(lora_rank):
    policy = LanguageModel(tiny_model(layers=3), num_layers_unfrozen=1)
    model = reward_model(layers=3)
    before = weights(model)
    fit(model, PAIRS[:30], num_layers_unfrozen=1, lora_rank=lora_rank)
    names = changed(model, before)
    assert names
    assert all(".layers.2." in n or "reward_head" in n or "model.norm" in n for n in names)
    assert put_on_trunk(model, policy) is not None
    assert model.base_model.model.layers[0].mlp.up_proj.weight is (
        policy.model.model.layers[0].mlp.up_proj.weight
    )
    whole = reward_model(layers=3)
    fit(whole, PAIRS[:30], lora_rank=lora_rank)
    assert put_on_trunk(whole, policy) is None


# Early stopping


def test_the_best_weights_are_restored():
    """Held-out pairs the other way round: every step makes their loss worse."""
    reversed_pairs = [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in OTHERS
    ]
    seen = []
    model = tiny_classifier()

    def note(metrics):
        seen.append((metrics, weights(model)))

    result = fit(
        model,
        held_out=reversed_pairs,
        batch_size=8,
        num_epochs=9,
        eval_steps=2,
        early_stopping_patience=3,
        on_step=note,
    )
    losses = {m["step"]: m["held_out/loss"] for m, _ in seen if "held_out/loss" in m}
    best = min(losses, key=losses.get)
    assert len(result.history) == best + 6 < 100, "three evaluations after the best"
    assert result.evaluation["loss"] == losses[best] < result.history[-1]["held_out/loss"]
    assert not changed(model, seen[best - 1][1])
    assert evaluate_reward_model(model, TOKENIZER, reversed_pairs) == pytest.approx(
        result.evaluation
    )


def test_without_patience_the_last_weights_stay():
    result = fit(tiny_classifier(), held_out=OTHERS, num_epochs=2, batch_size=50, eval_steps=4)
    evaluated = [m["step"] for m in result.history if "held_out/loss" in m]
    assert evaluated == [4, 6], "at the end too"
    assert evaluate_reward_model(result.model, TOKENIZER, OTHERS) == pytest.approx(
        result.evaluation
    )
