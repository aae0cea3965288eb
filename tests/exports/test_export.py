"""What a run leaves loads without ppo_fast: policies, adapters and critics."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from tiny_adapters import adapted, base_model
from tiny_models import tiny_classifier, tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters, names, tiny_trainer, tiny_value_model, weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from ppo_fast import PPO, PPOConfig, ValueModel
from ppo_fast.exports import export
from ppo_fast.exports.export import export_policy, load_critic, save_critic
from ppo_fast.exports.model_card import ModelCard
from ppo_fast.models.lora import with_lora
from ppo_fast.models.quantized import load_quantized

IDS = torch.arange(12).reshape(2, 6)


def trained(policy, value_model=None, **options):
    """A trainer after two steps, so that no weight is as it started."""
    settings = {"critic": "head", "max_length": 6, "learning_rate": 1e-2, "num_epochs": 2}
    ppo = PPO(
        policy,
        tiny_tokenizer(),
        count_letters,
        value_model=value_model,
        config=PPOConfig(**settings | options),
    )
    for _ in range(2):
        ppo.step(PROMPTS)
    return ppo


def values_of(ppo):
    """Return a rollout's tokens, and the critic's values [B, T] of them."""
    rollout = ppo.rollout(PROMPTS)
    with torch.no_grad():
        states = ppo.policy.forward(rollout.tokens).states
        return rollout.tokens, ppo.critic.values(rollout.tokens, states)


# Policies


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_loads_by_peft(family, tmp_path):
    ppo = trained(adapted(family))
    base_model(family).save_pretrained(tmp_path / "base")
    kind = export_policy(
        ppo.policy.model,
        ppo.tokenizer,
        tmp_path / "out",
        adapter_only=True,
        card=ModelCard("a run", "policy"),
    )
    assert "An adapter trained with" in (tmp_path / "out" / "README.md").read_text()
    assert kind == "adapter"
    saved = names(tmp_path / "out")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {*saved}
    assert "model.safetensors" not in saved
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out"
    )
    expected = ppo.policy.model(IDS).logits
    torch.testing.assert_close(loaded.eval()(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert (base_model(family)(IDS).logits - expected).abs().max() > 1e-2
    texts = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert texts("The film").input_ids == tiny_tokenizer()("The film").input_ids


def test_a_whole_policy_has_its_adapters_merged(tmp_path):
    ppo = trained(adapted())
    card = ModelCard("a run", "adapter")
    kind = export_policy(ppo.policy.model, ppo.tokenizer, tmp_path / "out", card=card)
    assert kind == "policy"
    assert "A policy trained with" in (tmp_path / "out" / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = ppo.policy.model(IDS).logits
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="policy: LlamaForCausalLM has no adapter of peft"):
        export_policy(loaded, ppo.tokenizer, tmp_path / "out", adapter_only=True)


def test_of_a_quantised_base_the_adapter_is_saved(tmp_path):
    pytest.importorskip("bitsandbytes")
    base_model().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    ppo = trained(with_lora(load_quantized(base, "4bit", "cpu"), 4))
    assert export_policy(ppo.policy.model, ppo.tokenizer, tmp_path / "out") == "adapter"
    loaded = PeftModel.from_pretrained(load_quantized(base, "4bit", "cpu"), tmp_path / "out")
    torch.testing.assert_close(loaded.eval()(IDS).logits, ppo.policy.model(IDS).logits)
    with pytest.raises(ValueError, match="critic: its backbone is quantised"):
        save_critic(ppo, tmp_path / "critic", whole=True)


# Critics


def critics(name):
    if name == "model":
        value_model = ValueModel.from_reward_model(tiny_classifier(layers=1, hidden=32))
        return trained(base_model(), value_model, critic="model")
    policy = adapted(k=2, family="gpt2") if name == "gpt2 top" else adapted(k=2)
    if name == "plain":
        policy = base_model("gpt2")
    critic = "top" if "top" in name else "head"
    return trained(policy, critic=critic, num_layers_unfrozen=2 if "top" in name else None)


LOADED = """
import sys, torch
from transformers import AutoModelForTokenClassification
model = AutoModelForTokenClassification.from_pretrained(sys.argv[1])
rows = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save([model(input_ids=row[None]).logits for row in rows], sys.argv[2])
assert "ppo_fast" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["head", "top", "gpt2 top", "plain", "model"])
def test_a_whole_critic_is_a_token_classifier(name, tmp_path):
    ppo = critics(name)
    before = weights(ppo.policy.model)
    save_critic(ppo, tmp_path / "critic", whole=True, card=ModelCard("a run", "critic"))
    assert (tmp_path / "critic" / "README.md").exists()
    assert all(torch.equal(w, before[n]) for n, w in ppo.policy.model.state_dict().items())
    tokens, expected = values_of(ppo)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic")
    assert model.config.id2label == {0: "value"}
    for b, ids in enumerate(tokens.sequences()):
        p, n = int(tokens.prompt_lengths[b]), int(tokens.response_lengths[b])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits
        assert logits.shape == (1, len(ids), 1)
        torch.testing.assert_close(logits[0, p - 1 : -1, 0], expected[b, :n], rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 1e-3


@pytest.mark.slow
def test_a_process_without_ppo_fast_loads_it(tmp_path):
    ppo = critics("head")
    save_critic(ppo, tmp_path / "critic", whole=True)
    tokens, expected = values_of(ppo)
    torch.save(tokens.sequences(), tmp_path / "rows")
    command = [sys.executable, "-c", LOADED, str(tmp_path / "critic"), str(tmp_path / "rows")]
    subprocess.run(command, check=True, cwd=tmp_path)
    for b, logits in enumerate(torch.load(tmp_path / "rows")):
        p, n = int(tokens.prompt_lengths[b]), int(tokens.response_lengths[b])
        torch.testing.assert_close(logits[0, p - 1 : -1, 0], expected[b, :n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("critic", ["head", "top", "model"])
def test_the_trained_weights_of_a_critic_come_back(critic, tmp_path):
    def make(**options):
        value_model = tiny_value_model() if critic == "model" else None
        k = 1 if critic == "top" else None
        return trained(base_model(), value_model, critic=critic, num_layers_unfrozen=k, **options)

    ppo, other = make(), make(value_learning_rate=5e-2)
    save_critic(ppo, tmp_path / "critic", card=ModelCard("a run", "critic"))
    assert names(tmp_path / "critic") == ["README.md", "config.json", "model.safetensors"]
    assert "load_critic(" in (tmp_path / "critic" / "README.md").read_text()
    described = json.loads((tmp_path / "critic" / "config.json").read_text())
    assert described["hidden_size"] == 32
    expected, found = weights(ppo.critic.module), weights(other.critic.module)
    assert any(not torch.equal(found[name], expected[name]) for name in expected)
    load_critic(other.critic.module, tmp_path / "critic")
    found = weights(other.critic.module)
    trained_names = {n for n, p in ppo.critic.module.named_parameters() if p.requires_grad}
    assert all(torch.equal(found[name], expected[name]) for name in trained_names)


def test_what_cannot_be_saved_or_loaded(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="critic: Baseline has no weights"):
        save_critic(tiny_trainer(critic="baseline"), tmp_path / "critic")
    with pytest.raises(ValueError, match="ValueModel is a small MLP, for which"):
        save_critic(tiny_trainer(), tmp_path / "critic", whole=True)
    cohere = trained(base_model("cohere"))
    with pytest.raises(ValueError, match="no token classifier for 'cohere'; use whole=False"):
        save_critic(cohere, tmp_path / "critic", whole=True)
    assert not names(tmp_path)

    head = tiny_trainer(critic="head")
    monkeypatch.setattr(export, "_body_and_head", lambda ppo: (ppo.policy.body, other))
    other = nn.Linear(32, 1)
    monkeypatch.setattr(export, "relative_difference", lambda *_: 0.5)
    with pytest.raises(ValueError, match="LlamaForTokenClassification gives other values"):
        save_critic(head, tmp_path / "critic", whole=True)
    with pytest.raises(FileNotFoundError, match=r"holds no config.json and model.safetensors"):
        load_critic(head.critic.module, tmp_path)
    save_critic(head, tmp_path / "critic")
    with pytest.raises(ValueError, match="holds a ValueHead, expected a ValueModel"):
        load_critic(tiny_trainer().critic.module, tmp_path / "critic")
    wider = tiny_trainer(critic="head", hidden=64)
    with pytest.raises(ValueError, match=r"weight has shape \(1, 32\), expected \(1, 64\)"):
        load_critic(wider.critic.module, tmp_path / "critic")


def test_a_whole_critic_changes_nothing_of_the_training(tmp_path):
    trainer = tiny_trainer(critic="head")
    trainer.policy_model.train()
    before = torch.get_rng_state()
    save_critic(trainer, tmp_path / "critic", whole=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(part.training for part in trainer.policy_model.modules())
