"""train_reward_model: what it saves, and what it refuses."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from reward_fits import OTHERS, PAIRS, TEMPLATE, TOKENIZER, fit, reward_model
from tiny_models import MAX_POSITIONS, tiny_classifier, tiny_model, tiny_tokenizer
from tiny_pairs import as_chats
from tiny_trainer import no_model_runs, one_line, weights
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ppo_fast.models.adapters import adapted_layers
from ppo_fast.rewards.encoding import Encoder
from ppo_fast.rewards.fit.loss import pair_losses
from ppo_fast.rewards.fit.settings import RewardModelConfig
from ppo_fast.rewards.fit.train import evaluate_reward_model, train_reward_model
from ppo_fast.rewards.load import load_reward

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
