"""Devices that are not there, wrappers of TRL, and torch's default dtype."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters
from torch import nn

from ppo_fast import PPO, PPOConfig

CONFIG = {"critic": "head", "max_length": 4}


def ppo_of(model, **options):
    config = PPOConfig(**(CONFIG | options.pop("config", {})))
    return PPO(model, tiny_tokenizer(), count_letters, config=config, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_device_auto_and_missing():
    assert ppo_of(tiny_model(), device="auto").device == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device: got 'cuda', but torch .* finds no CUDA GPU"):
        ppo_of(tiny_model(), device="cuda")
    with pytest.raises(ValueError, match="device: got 'gpu', expected 'cpu', 'cuda'"):
        ppo_of(tiny_model(), device="gpu")


class AutoModelForCausalLMWithValueHead(nn.Module):
    """The shape of TRL's class of this name."""

    def __init__(self):
        super().__init__()
        self.pretrained_model, self.v_head = tiny_model(), nn.Linear(64, 1)


def test_a_model_with_a_value_head_of_trl():
    with pytest.raises(TypeError, match=r"model\.pretrained_model, .*critic='head'"):
        ppo_of(AutoModelForCausalLMWithValueHead())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("critic", ["head", "top", "baseline"])
def test_a_default_dtype_changes_nothing(dtype, critic):
    settings = {"critic": critic} | ({"num_layers_unfrozen": 1} if critic == "top" else {})
    expected = ppo_of(tiny_model(), config=settings).step(PROMPTS).metrics
    model, tokenizer = tiny_model(), tiny_tokenizer()
    torch.set_default_dtype(dtype)
    try:
        ppo = PPO(model, tokenizer, count_letters, config=PPOConfig(**(CONFIG | settings)))
        found = ppo.step(PROMPTS).metrics
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in expected.items():
        if not name.startswith(("time/", "perf/")):
            assert found[name] == value, name


@pytest.mark.parametrize("critic", ["head", "top", "baseline"])
def test_autocast_around_the_trainer(critic):
    settings = {"critic": critic} | ({"num_layers_unfrozen": 1} if critic == "top" else {})
    with torch.autocast("cpu", torch.bfloat16):
        metrics = ppo_of(tiny_model(), config=settings).step(PROMPTS).metrics
    assert metrics["first_max_log_ratio"] < 1e-6
    assert metrics["sampling_logprob_difference"] < 0.02


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("trained_weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [None, 1])
def test_weights_in_bfloat16(family, trained_weights, k):
    settings = {"compute_dtype": "bfloat16", "num_layers_unfrozen": k}
    settings["trained_weights"] = "stochastic" if trained_weights == "bfloat16" else "float32"
    ppo = ppo_of(tiny_model(family).to(torch.bfloat16), config=settings)
    assert ppo.step(PROMPTS).metrics["first_max_log_ratio"] < 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_returns_tuples(family):
    model = tiny_model(family)
    model.config.return_dict = False
    assert ppo_of(model).step(PROMPTS).metrics["first_max_log_ratio"] < 1e-5
