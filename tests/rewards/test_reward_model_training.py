"""train_reward_model: what it learns, what it leaves alone, what it saves, and what it refuses."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from tiny_models import MAX_POSITIONS, tiny_classifier, tiny_model, tiny_tokenizer
from tiny_pairs import as_chats, tiny_pairs
from tiny_trainer import changed, no_model_runs, one_line, weights
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ppo_fast.models.adapters import adapted_layers
from ppo_fast.models.heads import RewardModel
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.setup import put_on_trunk
from ppo_fast.rewards.encoding import Encoder
from ppo_fast.rewards.fit.loss import calibration, pair_losses, pair_metrics
from ppo_fast.rewards.fit.settings import RewardModelConfig
from ppo_fast.rewards.fit.train import evaluate_reward_model, train_reward_model
from ppo_fast.rewards.load import load_reward

PAIRS, OTHERS = tiny_pairs(120), tiny_pairs(40, seed=1)
TOKENIZER = tiny_tokenizer()
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

slow = pytest.mark.slow


def fit(model, pairs=PAIRS, *, held_out=None, tokenizer=TOKENIZER, on_step=None, **settings):
    config = RewardModelConfig(**({"learning_rate": 3e-3} | settings))
    return train_reward_model(
        model, tokenizer, pairs, config=config, held_out=held_out, on_step=on_step
    )


def reward_model(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RewardModel(tiny_model(**options), 64)


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


# What it saves: a directory that plain transformers and --reward load, with the same tokens


@pytest.mark.parametrize("format", ["joined", "pair", "policy"])
@torch.no_grad()
def test_a_saved_model_gives_the_same_scores(tmp_path, format):
    result = fit(tiny_model("qwen2"), PAIRS[:40], held_out=OTHERS, format=format)
    result.model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    reward = load_reward(str(tmp_path), "cpu")
    assert (reward.format, reward.max_length) == (format, MAX_POSITIONS)
    chosen, rejected = (
        torch.tensor(reward([r["prompt"] for r in OTHERS], [r[side] for r in OTHERS]))
        for side in ("chosen", "rejected")
    )
    assert pair_losses(chosen, rejected).mean() == pytest.approx(
        result.evaluation["loss"], rel=1e-4
    )
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for row, score in zip(OTHERS[:5], chosen, strict=False):
        ids = {
            "joined": lambda a, b: tokenizer(a + b)["input_ids"],
            "pair": lambda a, b: tokenizer(a, b)["input_ids"],
            "policy": lambda a, b: [*tokenizer(a)["input_ids"], *tokenizer(b)["input_ids"], 0],
        }[format](row["prompt"], row["chosen"])
        torch.testing.assert_close(plain(torch.tensor([ids])).logits[0, 0], score)


@torch.no_grad()
def test_chats_are_read_by_the_template_in_training_and_after(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chats, others = [as_chats(row) for row in PAIRS], [as_chats(row) for row in OTHERS]
    result = fit(tiny_model(), chats, held_out=others, tokenizer=tokenizer)
    assert result.evaluation["accuracy"] >= 0.95
    result.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward(str(tmp_path), "cpu")
    assert reward.format == "chat"
    found = reward(["-"] * 40, ["-"] * 40, messages=[row["chosen"] for row in others])
    text = f"<user>{OTHERS[0]['prompt']}<|end|><assistant>{OTHERS[0]['chosen']}<|end|>"
    alone = result.model(**tokenizer(text, return_tensors="pt")).logits
    assert found[0] == pytest.approx(float(alone), abs=1e-4)
    assert torch.tensor(found).mean() > result.evaluation["reward_mean"]


def test_a_reward_model_reads_what_a_policy_samples():
    """The prompt's tokens, the response's, and EOS; chats by the template, as sampled."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = reward_model()
    result = fit(model, [as_chats(row) for row in PAIRS], tokenizer=tokenizer, held_out=0.2)
    assert result.evaluation["accuracy"] >= 0.95
    row = OTHERS[0]
    rows, _ = Encoder(model, tokenizer, "policy").encode(
        [as_chats(row)["chosen"][:1]], [row["chosen"]]
    )
    prompt = tokenizer(f"<user>{row['prompt']}<|end|><assistant>")["input_ids"]
    assert rows[0]["input_ids"] == [*prompt, *tokenizer(row["chosen"])["input_ids"], 0]
    with torch.no_grad():
        expected = model(torch.tensor([rows[0]["input_ids"]]))
    found = model.get_rewards([tokenizer.decode(prompt)], [row["chosen"]], tokenizer, "cpu")
    torch.testing.assert_close(found, expected)


def test_long_prompts_are_cut_with_one_warning(caplog):
    rows = [row | {"prompt": "x" * 90 + row["prompt"]} for row in PAIRS[:8]] + PAIRS[8:20]
    with caplog.at_level(logging.WARNING):
        result = fit(tiny_classifier("qwen2"), rows, max_length=60, batch_size=20)
    (record,) = caplog.records
    assert (
        "of 16 of 40 texts the beginning of the prompt is cut, to max_length 60"
        in record.getMessage()
    )
    assert result.model.config.reward_max_length == 60
    with pytest.raises(
        ValueError, match=r"pairs\[2\]: its rejected response has 70 tokens, and max_l"
    ) as error:
        fit(
            tiny_classifier(), [*PAIRS[:2], PAIRS[2] | {"rejected": "x" * 70}, *rows], max_length=60
        )
    assert one_line(error)
    assert "raise max_length" in str(error.value)


# What it refuses


def test_a_step_that_is_not_finite_changes_nothing():
    model = tiny_classifier()
    before = []

    def break_it(metrics):
        model.score.weight.data[0, 3] = math.inf
        before.append(weights(model))

    with pytest.raises(
        FloatingPointError, match=r"step 2: the loss is .*; this step changed nothing"
    ):
        fit(model, PAIRS[:40], batch_size=10, on_step=break_it, lora_rank=2)
    assert not adapted_layers(model)
    assert torch.equal(model.score.weight, before[0]["score.weight"])
    assert all(p.grad is None for p in model.parameters())


def test_held_out_rewards_that_are_not_finite():
    model = tiny_classifier()
    bad = TOKENIZER("z")["input_ids"][0]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = math.nan
    rows = [row | {"chosen": "z"} for row in OTHERS]
    with pytest.raises(FloatingPointError, match="held-out pairs after step 1: 40 of 40 pairs"):
        fit(model, PAIRS[:8], held_out=rows)


def three_labels():
    config = copy.deepcopy(tiny_classifier().config)
    config.num_labels = 3
    return AutoModelForSequenceClassification.from_config(config)


def no_pad():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": torch.nn.Linear(2, 1)}, "model: got Linear, expected a sequence classifier"),
        ({"model": tiny_model().model}, "model: got LlamaModel, expected a sequence classifier"),
        ({"model": three_labels()}, "has num_labels=3, expected 1; load it with num_labels=1"),
        ({"model": tiny_model("cohere")}, "of CohereForCausalLM's family; use ppo_fast.R"),
        ({"model": tiny_model(vocab_size=41)}, "tokenizer: its largest id is 306, but model has"),
        ({"tokenizer": no_pad()}, "tokenizer: has no pad token"),
        ({"tokenizer": "words"}, "tokenizer: got str"),
        ({"pairs": [{"prompt": "a"}]}, r"pairs\[0\]: has no \"chosen\""),
        ({"pairs": [as_chats(PAIRS[0])] * 3, "format": "chat"}, "no chat template"),
        ({"held_out": 1.5}, "held_out: got 1.5"),
        ({"held_out": []}, "held_out: there are none"),
        ({"held_out": [{"chosen": "a"}]}, r"held_out\[0\]: has no \"rejected\""),
        ({"early_stopping_patience": 2}, "early_stopping_patience: needs held-out pairs"),
        ({"num_layers_unfrozen": 2}, "num_layers_unfrozen: got 2, expected 1 to 1"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_before_any_model_runs(arguments, message):
    given = {"model": tiny_classifier()} | arguments
    with no_model_runs(), pytest.raises((TypeError, ValueError), match=message) as error:
        fit(**given)
    assert one_line(error)


def test_chats_need_a_template_in_any_form():
    with pytest.raises(ValueError, match="chat"):
        fit(tiny_classifier(), [as_chats(row) for row in PAIRS[:3]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, expected a whole number >= 1"),
        ({"learning_rate": -1}, "learning_rate: got -1, expected a number above 0"),
        ({"centering": -1}, "centering: got -1"),
        ({"lr_warmup": 1.5}, "lr_warmup: got 1.5"),
        ({"format": "chats"}, "format: got 'chats', expected one of"),
        ({"compute_dtype": "float16"}, "compute_dtype: got 'float16'"),
        ({"lora_rank": 0}, "lora_rank: got 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardModelConfig(**settings)


def test_what_is_no_config():
    with pytest.raises(TypeError, match="config: got dict, expected a RewardModelConfig"):
        train_reward_model(tiny_classifier(), TOKENIZER, PAIRS, config={})
    with pytest.raises(TypeError, match="model: got LlamaForCausalLM, which gives no reward"):
        evaluate_reward_model(tiny_model(), TOKENIZER, PAIRS)
