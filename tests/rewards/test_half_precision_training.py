"""train_reward_model with models in half precision: nothing of what is learned is rounded away."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_classifier, tiny_model, tiny_tokenizer
from tiny_pairs import tiny_pairs
from tiny_trainer import changed, weights
from transformers import AutoModelForSequenceClassification

from ppo_fast.models.adapters import adapted_layers
from ppo_fast.models.heads import RewardModel
from ppo_fast.rewards.classifier import ClassifierReward
from ppo_fast.rewards.fit.settings import RewardModelConfig
from ppo_fast.rewards.fit.train import evaluate_reward_model, train_reward_model

PAIRS, OTHERS = tiny_pairs(24), tiny_pairs(12, seed=1)
TOKENIZER = tiny_tokenizer()
TEXTS = [row["prompt"] for row in OTHERS], [row["chosen"] for row in OTHERS]


def fit(model, *, on_step=None, **settings):
    config = RewardModelConfig(**({"compute_dtype": "bfloat16", "learning_rate": 1e-4} | settings))
    return train_reward_model(
        model, TOKENIZER, PAIRS, config=config, held_out=OTHERS, on_step=on_step
    )


def reward_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RewardModel(tiny_model(), 64)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("setting", ["lora_rank", "num_layers_unfrozen", "seed"])
def test_a_trained_model_is_float32_and_is_a_reward(family, setting):
    result = fit(tiny_classifier(family).bfloat16(), **{setting: 1})
    assert {w.dtype for w in weights(result.model).values()} == {torch.float32}
    scores = torch.tensor(ClassifierReward(result.model, TOKENIZER)(*TEXTS))
    assert scores.std() > 0
    config = RewardModelConfig(compute_dtype="bfloat16")
    found = evaluate_reward_model(result.model, TOKENIZER, OTHERS, config=config)
    assert found["loss"] == pytest.approx(result.evaluation["loss"], rel=0.2)


@pytest.mark.parametrize("make", [tiny_classifier, reward_model])
def test_merged_adapters_are_whole(make, tmp_path):
    model = make().bfloat16()
    before, learned = weights(model), {}

    def note(_):
        for name, layer in model.named_modules():
            if hasattr(layer, "base_layer"):
                learned[f"{name}.weight"] = layer.get_delta_weight("default").detach().clone()

    fit(model, lora_rank=2, on_step=note)
    after = weights(model)
    assert not adapted_layers(model)
    assert len(learned) > 8
    for name, delta in learned.items():
        merged = after[name] - before[name].float()
        assert delta.norm() > 0
        assert (merged - delta).norm() < 1e-3 * delta.norm()
    if isinstance(model, RewardModel):
        assert model.get_rewards(*TEXTS, TOKENIZER, "cpu").isfinite().all()
    else:
        model.save_pretrained(tmp_path)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto")
        assert not changed(loaded, after)


def test_float64_stays():
    model = tiny_classifier().double()
    fit(model, compute_dtype=None)
    assert {w.dtype for w in weights(model).values()} == {torch.float64}


@pytest.mark.parametrize("make", [tiny_classifier, reward_model])
def test_heads_compute_in_float32(make):
    model = make()
    head = model.reward_head if isinstance(model, RewardModel) else model.score
    body = model.base_model.model if isinstance(model, RewardModel) else model.model
    products, dtypes = [], []
    head.register_forward_hook(lambda *given: dtypes.append(given[-1].dtype))
    layer = body.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda *given: products.append(given[-1].dtype))
    result = fit(model)
    assert set(products) == {torch.bfloat16}
    assert len(dtypes) > 2
    assert set(dtypes) == {torch.float32}
    assert "forward" not in vars(head)
    assert result.evaluation["reward_std"] > 0


def test_large_rewards_keep_their_differences():
    """Near 1000, numbers in bfloat16 are multiples of 4."""
    model = reward_model()
    model.reward_head[3].bias.data.fill_(1000.0)
    found = [
        evaluate_reward_model(
            model, TOKENIZER, OTHERS, config=RewardModelConfig(compute_dtype=dtype)
        )
        for dtype in (None, "bfloat16")
    ]
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=0.02)
    assert found[1]["reward_std"] == pytest.approx(found[0]["reward_std"], rel=0.05)
