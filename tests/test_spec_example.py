"""The usage example of the classic interface runs with only its imports changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

EXAMPLE = Path(__file__).parent / "data" / "spec_usage.py"


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """Make 'gpt2' a random model of one thin layer, with the hidden size of GPT-2."""
    sizes = {"vocab_size": VOCAB_SIZE, "n_layer": 1, "n_inner": 64}
    config = AutoConfig.for_model("gpt2", **sizes, bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None  # as GPT-2's
    tokenizer.save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_spec_usage(gpt2, capsys):
    text = EXAMPLE.read_text("utf-8")
    # 100 steps take many minutes, even of this model: two show the same
    shorter = text.replace("num_steps=100", "num_steps=2").replace("freq=10", "freq=1")
    assert shorter != text
    names: dict = {}
    with pytest.warns(UserWarning, match=r"gamma: 0\.99 over 150 tokens leaves 0\.22"):
        exec(compile(shorter, str(EXAMPLE), "exec"), names)

    results, stats = names["results"], names["stats"]
    for name, entries in results["training_history"].items():
        assert len(entries) == 2, name
    assert results["final_stats"]["avg_reward"] == results["final_avg_reward"]
    assert stats["total_steps"] == 2
    rollout = names["ppo_trainer"].last_rollout
    assert len(rollout.prompts) == 3, "a batch larger than the list is the list"
    assert 3 < rollout.tokens.response_ids.shape[1] <= 150
    saved = {path.name for path in (gpt2 / "checkpoints").glob("*.pt")}
    assert saved == {"ppo_checkpoint_step_1.pt", "ppo_checkpoint_step_2.pt"}
    start = AutoModelForCausalLM.from_pretrained("gpt2")
    weight = "transformer.h.0.attn.c_attn.weight"
    trained = names["policy_model"].cpu().state_dict()[weight]
    assert not torch.equal(trained, start.state_dict()[weight])
    out = capsys.readouterr().out
    assert re.search(r"^Final avg reward: -?\d+\.\d{4}$", out, re.MULTILINE)
    assert re.search(r"^Final KL divergence: -?\d+\.\d{4}$", out, re.MULTILINE)
    assert "'total_steps': 2" in out


def test_the_example_is_that_of_the_guide():
    """The example has the calls and arguments of the classic trainer's guide."""
    text = EXAMPLE.read_text("utf-8")
    for part in (
        'from_pretrained("gpt2")',
        "RewardModel(base_model_for_reward, hidden_size=768)",
        "ValueModel(base_model_for_value, hidden_size=768)",
        "num_steps=100",
        "batch_size=4",
        "max_length=150",
        "checkpoint_freq=10",
        "results['final_stats']['avg_kl_divergence']",
    ):
        assert part in text
