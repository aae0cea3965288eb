"""Operations of a step, by hand and by PyTorch's counter; rates, memory and peaks of GPUs."""

from __future__ import annotations

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import GEMMA_4, tiny_model
from tiny_trainer import PROMPTS, tiny_trainer
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from ppo_fast.data.tokens import make_tokens
from ppo_fast.runs import performance
from ppo_fast.runs.flops import Sizes, sizes_of, step_flops
from ppo_fast.runs.performance import Performance, peak_memory_gb, peak_of

# two layers, of which the upper is trained
SIZES = Sizes((10, 20), (0, 20), queries=3, head=100)


def test_passes_by_hand():
    # 3 tokens attend to 1 + 2 + 3 others, tokens 1 and 2 to 2 + 3
    assert SIZES.forward(0, 3) == 2 * 30 * 3 + 4 * 3 * 6 * 2
    assert SIZES.forward(1, 3) == 2 * 30 * 2 + 4 * 3 * 5 * 2
    assert SIZES.forward(0, 3, layers=1) == 2 * 20 * 3 + 4 * 3 * 6
    assert SIZES.backward(0, 3) == 2 * 20 * 3 + 2 * 20 * 3 + 2 * 4 * 3 * 6
    adapted = SIZES._replace(trained=(1, 1))  # gradients go through frozen weights too
    assert adapted.backward(0, 3) == 2 * 30 * 3 + 2 * 2 * 3 + 2 * 4 * 3 * 6 * 2
    assert SIZES._replace(trained=(0, 0)).backward(0, 3) == 0


def test_a_step_by_hand():
    tokens = make_tokens([[1, 2]] * 2, [[3], [4, 5]], 0, torch.device("cpu"))
    s = Sizes((1,), (1,), head=10, head_trained=True)  # 2 a token, 20 a token of a response
    prompts, responses, both, head = 2 * 4, 2 * 1, 2 * (2 + 3), 20 * 3
    rollout = prompts + responses + head
    update = both + head + 2 * both + 2 * head
    assert step_flops(tokens, s) == rollout + (both + head) + update
    once = step_flops(tokens, s, samples_per_prompt=2)
    assert once == step_flops(tokens, s) - prompts / 2
    packed = step_flops(tokens, s, samples_per_prompt=2, policy_packed=True)
    assert packed == once - 4 * prompts / 2, "forward of the reference, forward and backward"
    assert step_flops(tokens, s, policy_epochs=3) == step_flops(tokens, s) + 2 * update
    assert step_flops(tokens, s, old_computed=True) == step_flops(tokens, s) + both + head
    frozen = step_flops(tokens, s._replace(head_trained=False))
    assert frozen == step_flops(tokens, s) - head
    value = Sizes((5,), (5,))
    more = step_flops(tokens, s, value, value_epochs=2) - step_flops(tokens, s)
    assert more == 5 * both * (1 + 2 * 3)
    of_prompts = step_flops(tokens, s, value, value_of_prompts=True) - step_flops(tokens, s)
    assert of_prompts == 5 * prompts * (1 + 3)


def test_a_trunk_is_passed_once():
    tokens = make_tokens([[1, 2]], [[3, 4]], 0, torch.device("cpu"))
    whole, above = step_flops(tokens, SIZES), step_flops(tokens, SIZES, top=1)
    lower = SIZES.forward(0, 3) - SIZES.forward(0, 3, layers=1)  # without the last token
    assert whole - above == 2 * lower  # of the reference, and of the epoch's forward pass


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_products_are_those_that_pytorch_counts(family):
    model, n = tiny_model(family, layers=2, hidden=32).requires_grad_(True), 5
    sizes = sizes_of(model)

    def products(counted):
        """The products with weights; attention has a kernel of its own on the CPU."""
        found = counted.get_flop_counts()["Global"]
        return sum(count for op, count in found.items() if op.__name__ in ("mm", "addmm"))

    with FlopCounterMode(display=False) as counted:
        loss = model(torch.arange(n)[None]).logits.sum()
        forward = products(counted)
        loss.backward()
    assert forward == sizes._replace(queries=0).forward(0, n) + 2 * sizes.head * n
    backward = sizes._replace(queries=0).backward(0, n) + 4 * sizes.head * n
    assert products(counted) - forward == backward


def test_a_token_visits_some_experts():
    sizes = sizes_of(tiny_model("qwen3_moe", layers=1, hidden=32))
    experts, router, attention = 8 * 3 * 768 * 32, 128 * 32, 4 * 32 * 32
    assert sizes.weights == (experts + router + attention,)


def test_layers_with_heads_of_different_sizes():
    """A config of Gemma 4 raises where the size of all heads is read of it."""
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("transformers has no gemma4_text")
    config = AutoConfig.for_model("gemma4_text", **GEMMA_4)
    assert sizes_of(AutoModelForCausalLM.from_config(config)).queries == 4 * (16 + 16 + 32) / 3


def test_adapters_are_weights_of_their_own():
    plain = tiny_model(layers=1, hidden=32)
    before = sizes_of(plain)
    adapted = sizes_of(get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"])))
    assert adapted.weights[0] == before.weights[0] + 2 * 2 * 32
    assert adapted.trained == (2 * 2 * 32,)
    assert not adapted.head_trained


def test_a_module_that_is_no_transformer_is_one_layer():
    module = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3))
    assert sizes_of(module) == Sizes((12,), (12,))


def test_metrics_of_a_step():
    trainer = tiny_trainer(critic="model", num_epochs=2)
    step = trainer.step(PROMPTS)
    measured = Performance(trainer.policy, trainer.critic, trainer.config)
    measured.begin_step()
    seconds = {"time/rollout": 1.0, "time/experience": 0.5, "time/update": 2.5}
    found = measured.metrics(step.rollout, seconds)
    tokens = step.rollout.tokens
    assert found["perf/tokens_per_second"] == int(tokens.lengths.sum()) / 4
    assert found["perf/response_tokens_per_second"] == int(tokens.response_lengths.sum())
    flops = step_flops(
        tokens,
        sizes_of(trainer.policy_model),
        sizes_of(trainer.critic.module),
        policy_epochs=2,
        value_epochs=2,
    )
    assert found["perf/tflops"] == pytest.approx(flops / 4 / 1e12)
    assert 0.05 < found["perf/peak_memory_gb"] < 200
    assert "perf/mfu" not in found


def test_epochs_that_target_kl_ended_do_not_count():
    trainer = tiny_trainer(critic="baseline", num_epochs=4, num_minibatches=2)
    step = trainer.step(PROMPTS)
    measured = Performance(trainer.policy, trainer.critic, trainer.config)
    seconds = {"time/rollout": 1.0, "time/experience": 1.0, "time/update": 1.0}
    some = measured.metrics(step.rollout, seconds | {"policy_optimizer_steps": 4.0})
    two = measured.metrics(step.rollout, seconds, policy_epochs=2)
    assert some["perf/tflops"] == two["perf/tflops"]
    assert some["perf/tflops"] < measured.metrics(step.rollout, seconds)["perf/tflops"]


def test_a_trained_part_of_the_layers_has_sizes():
    trainer = tiny_trainer(critic="top", num_layers_unfrozen=1, layers=2)
    sizes = sizes_of(trainer.policy_model)
    assert sizes.trained[0] == 0 < sizes.trained[1] == sizes.weights[1]
    assert sizes_of(trainer.critic.module).weights == sizes.weights
    assert performance._top(trainer.policy) == performance._top(trainer.critic) == 1


def test_peaks_of_gpus():
    assert peak_of("NVIDIA H100 80GB HBM3") == peak_of("NVIDIA H200") == 989
    assert peak_of("NVIDIA H100 PCIe") == 756
    assert peak_of("NVIDIA A100-SXM4-80GB") == peak_of("NVIDIA A100 80GB PCIe") == 312
    assert peak_of("NVIDIA L4") == 121
    assert peak_of("NVIDIA GeForce RTX 4090") == 165.2
    for unknown in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU",
                    "NVIDIA A10G", "NVIDIA GH200 480GB", "AMD Instinct MI300X"):  # fmt: skip
        assert peak_of(unknown) is None


def test_memory_is_in_bytes_of_the_system(monkeypatch):
    import resource
    from types import SimpleNamespace

    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2_000_000))
    cpu = torch.device("cpu")
    monkeypatch.setattr(performance.sys, "platform", "linux")
    assert peak_memory_gb(cpu) == 2.048
    monkeypatch.setattr(performance.sys, "platform", "darwin")
    assert peak_memory_gb(cpu) == 0.002


def test_without_the_module_resource_there_is_no_peak(monkeypatch):
    """Windows has none."""
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory_gb(torch.device("cpu")) is None
