"""The memory plan, against the tensors of a real run."""

from __future__ import annotations

import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tiny_models import (
    FAMILIES,
    GEMMA_4,
    tiny_classifier,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from tiny_trainer import count_letters, tiny_value_model
from transformers import CONFIG_MAPPING, AutoConfig

from ppo_fast import PPOConfig, PPOTrainer
from ppo_fast.cli.main import main
from ppo_fast.diagnostics.memory_plan import (
    MemoryPlan,
    classifier_bytes,
    plan_memory,
    plans,
)
from ppo_fast.models.lora import with_lora
from ppo_fast.ops import QuantizedRows
from ppo_fast.rollout import slots
from ppo_fast.rollout.speedups.step_forward import StepForward

PROMPTS, SAMPLES = ["The film was"], 12
NEW = 24


def num_bytes(tensors, without=()):
    """Return the bytes of the tensors' storages, each once, without those of ``without``."""
    ours = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    for tensor in without:
        ours.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(ours.values())


def measured(trainer, monkeypatch):
    """Return the bytes of each part of a MemoryPlan, measured on the tensors of a step."""
    found = {}
    policy = list(trainer.policy_model.parameters())
    found["policy"] = num_bytes(policy)
    found["reference"] = num_bytes(trainer.reference_model.parameters(), policy)
    value = [] if trainer.critic is None else list(trainer.critic.module.parameters())
    found["value_function"] = num_bytes(value, policy)
    copies, own = [], [p.data for p in policy]

    def note(*_):
        # the parameters of before, whose data may be copies now, and those in the model now
        in_model = [*policy, *trainer.policy_model.parameters()]
        copies.append(num_bytes([*in_model, *in_int8(trainer.policy_model)], own))

    caches = []
    start = slots._SlotLayer.lazy_initialization

    def noted(self, *args):
        start(self, *args)
        if self.slots == SAMPLES:  # not those of a check of the model, or of prompts
            caches.extend((self.keys, self.values))

    trainer.rollout(PROMPTS[:1])  # which checks the model
    monkeypatch.setattr(slots._SlotLayer, "lazy_initialization", noted)
    with noted_at_each_pass(trainer.policy_model, note):
        rollout = trainer.rollout(PROMPTS)
    found["copies"] = max(copies)
    found["cache"] = num_bytes(caches)
    assert rollout.tokens.response_lengths.tolist() == [NEW] * SAMPLES
    experience = trainer.make_experience(rollout)
    found["trunk_states"] = (
        0 if experience.trunk_states is None else experience.trunk_states.states.nbytes
    )

    gradients, kept, alive = [], {}, []

    def count(*_):
        weights = [p for g in trainer.policy_optimizer.param_groups for p in g["params"]]
        weights += [p for p in value if p.requires_grad]
        gradients.append(num_bytes([p.grad for p in weights if p.grad is not None]))

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    for optimizer in (trainer.policy_optimizer, trainer.value_optimizer):
        if optimizer is not None:
            optimizer.register_step_pre_hook(count)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        experience_of_rows = trainer.policy.forward(rollout.tokens, select(experience))
        trainer.policy.logprobs(experience_of_rows, rollout.tokens, temperature=1.0)
    for weight in policy:
        kept.pop(weight.untyped_storage().data_ptr(), None)
    found["activations and logits"] = sum(kept.values())
    trainer.update(experience)
    found["gradients"] = max(gradients)
    optimizers = [o for o in (trainer.policy_optimizer, trainer.value_optimizer) if o is not None]
    states = [s for o in optimizers for state in o.state.values() for s in state.values()]
    found["optimizer"] = num_bytes(
        [s for s in states if isinstance(s, torch.Tensor) and s.numel() > 1]
    )
    return found


def in_int8(model):
    """Yield the copies of weights in int8, and their scales, that forwards compute with now."""
    for forward in (vars(module).get("forward") for module in model.modules()):
        if isinstance(forward, StepForward):
            copies = forward._matrices.values()
        else:
            copies = [x for x in getattr(forward, "args", ()) if isinstance(x, QuantizedRows)]
        yield from (x for copy in copies if copy[1] is not None for x in copy)


@contextmanager
def noted_at_each_pass(model, note):
    handle = model.get_input_embeddings().register_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def select(experience):
    if experience.trunk_states is None:
        return None
    return experience.trunk_states


HALF = {"compute_dtype": "bfloat16"}
FORMS = {
    "float32": {},
    "rounded cache": {"kv_cache_dtype": "bfloat16"},
    "int8 rollouts": {"rollout_weights": "int8"},
    "LoRA": {},
    "LoRA, int8 rollouts": {"rollout_weights": "int8"},
    "bfloat16": HALF,
    "bfloat16, int8 rollouts": HALF | {"rollout_weights": "int8"},
    "stochastic": HALF | {"trained_weights": "stochastic"},
    "kahan": HALF | {"trained_weights": "kahan"},
    "LoRA on bfloat16": HALF,
    "LoRA in bfloat16": HALF,
}


WAYS = [
    *(("float32", critic, k) for critic in ("model", "head", "baseline") for k in (None, 2)),
    *((form, "top", 2) for form in FORMS),
    *((form, "head", None) for form in FORMS if form != "float32"),
    ("LoRA", "model", None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "critic", "k"), WAYS)
def test_a_plan_is_what_a_step_takes(form, critic, k, monkeypatch):
    settings = {"max_length": NEW, "learning_rate": 1e-4, "samples_per_prompt": SAMPLES}
    settings |= FORMS[form]
    config = PPOConfig(critic=critic, num_layers_unfrozen=k, **settings)
    value_model = tiny_value_model() if critic == "model" else None
    policy = tiny_model(layers=4)
    if config.compute_dtype is not None and form != "LoRA in bfloat16":
        policy.bfloat16().config.dtype = torch.bfloat16
    if form.startswith("LoRA"):
        policy = with_lora(policy, 4, k)
    trainer = PPOTrainer(policy, value_model, count_letters, tiny_tokenizer(), "cpu", config=config)
    trainer.engine.eos_ids = list
    prompt_length = len(trainer.tokenizer(PROMPTS[0])["input_ids"])
    plan = trainer.memory_plan(len(PROMPTS), prompt_length)
    found = measured(trainer, monkeypatch)
    both = plan.activations + plan.logits
    assert both == pytest.approx(found.pop("activations and logits"), rel=0.15)
    for part, size in found.items():
        assert getattr(plan, part) == pytest.approx(size, rel=0.15), part


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_planned(family):
    """Each plan takes less memory than the one before it."""
    found = plans(tiny_config(family, layers=5), PPOConfig(), batch_size=4, prompt_length=8)
    sizes = {name.replace(" of rank 16", ""): plan.peak for name, plan in found.items()}
    assert list(sizes) == [
        "all layers, a value model",
        "all layers, a value head",
        "4 top layers, a top critic",
        "4 top layers, a value head",
        "LoRA, a value head",
        "LoRA on 4 top layers, a value head",
    ]
    whole, head, top, top_head, lora, top_lora = sizes.values()
    assert whole > head > top > top_head > top_lora
    assert head > lora > top_lora


def test_layers_with_keys_of_different_sizes_are_planned():
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("transformers has no gemma4_text")
    model = AutoConfig.for_model("gemma4_text", **GEMMA_4)
    sizes = {"batch_size": 4, "prompt_length": 6, "device": "cuda"}
    cache = plan_memory(model, PPOConfig(max_length=8), **sizes).cache
    assert cache == 4 * 4 * (6 + 8) * 2 * 2 * (16 + 16 + 32)  # bytes, rows, tokens, 2 heads' two


def test_without_peft_there_are_no_plans_with_lora(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    found = plans(tiny_config("llama"), PPOConfig(), batch_size=4, prompt_length=8)
    assert len(found) == 4
    assert not any("LoRA" in name for name in found)


def test_planning_70_billion_weights_takes_no_memory():
    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=80,
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    top = PPOConfig(critic="top", num_layers_unfrozen=4, trunk_dtype="bfloat16", max_length=512)
    plan = plan_memory(config, top, batch_size=16, prompt_length=512)
    assert plan.policy == 4 * 70_553_706_496
    layer = 2 * 8192 * (8192 + 1024) + 3 * 8192 * 28672 + 2 * 8192
    assert plan.reference == 4 * (4 * layer + 8192 + 128256 * 8192)  # its head is not tied
    assert plan.trunk_states == 2 * 16 * 1024 * 8192
    assert plan.cache == 4 * 2 * 80 * 8 * 128 * 16 * 1024
    checkpointed = plan_memory(
        config,
        PPOConfig(critic="top", num_layers_unfrozen=4, gradient_checkpointing=True, max_length=512),
        batch_size=16,
        prompt_length=512,
    )
    assert checkpointed.activations < plan.activations / 2


def test_the_peak_is_the_larger_of_rollout_and_update():
    plan = MemoryPlan(1, 2, 4, 8, 16, 32, 64, 128, 50, 256, 512)
    assert plan.peak == 1 + 2 + 4 + 16 + 32 + 8 + 50 + 256 + 512
    larger = MemoryPlan(1, 2, 4, 8, 16, 32, 1000, 128, 50, 256, 512)
    assert larger.peak == 1 + 2 + 4 + 16 + 32 + 1128


def test_what_a_gpu_keeps_between_rollouts():
    def kept(device="cuda", **options):
        config = PPOConfig(compute_dtype="bfloat16", max_length=8, **options)
        plan = plan_memory(
            tiny_config("llama"), config, batch_size=4, prompt_length=8, device=device
        )
        return plan.kept_rollout, plan.cache, plan.copies

    both, cache, copies = kept()
    assert 0 < cache < copies
    assert both == cache + copies
    assert kept(kept_rollout_bytes=copies - 1)[0] == cache
    assert kept(kept_rollout_bytes=0)[0] == kept(cuda_graphs=False)[0] == kept("cpu")[0] == 0


def test_fused_layers_cache_float32_on_the_cpu_unless_kv_cache_dtype_says_otherwise():
    def cache(device, compute_dtype, **options):
        config = PPOConfig(compute_dtype=compute_dtype, max_length=8, **options)
        sizes = {"batch_size": 4, "prompt_length": 8, "device": device}
        return plan_memory(tiny_config("llama"), config, **sizes).cache

    in_half = cache("cuda", "bfloat16")
    assert cache("cpu", "bfloat16") == cache("cpu", None) == 2 * in_half
    for device, dtype in (("cpu", "bfloat16"), ("cpu", None), ("cuda", "bfloat16")):
        assert cache(device, dtype, kv_cache_dtype="bfloat16") == in_half


def test_the_margin_is_a_tenth_of_the_peak():
    plan = MemoryPlan(1000, *[0] * 10)
    assert (plan.peak, plan.with_margin) == (1000, 1100)


def shown_by(capsys, *arguments):
    """Return the rows of the command's table by name (each row's last); "": the plans' names."""
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none may be shown, not even another library's
        main(["plan", "--policy", "policy", "--max-length", "8", *arguments])
    shown = capsys.readouterr()
    assert shown.err == ""
    cells = [re.split(" *[│┃] *", line)[1:-1] for line in shown.out.splitlines()]
    return {row[0]: row[1:] for row in cells if row}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    tiny_config("llama", layers=1, hidden=512).save_pretrained("policy")


@pytest.mark.parametrize("options", [{}, {"compute_dtype": "bfloat16", "trained_weights": "kahan"}])
def test_what_a_check_of_both_gradients_and_an_undo_take(options):
    def plan(device="cpu", **more):
        config = PPOConfig(critic="model", **options, **more)
        shape = tiny_config("llama", layers=2)
        return plan_memory(shape, config, batch_size=2, prompt_length=8, device=device)

    both, apart = plan(), plan(check_gradients_together=False)
    assert both.gradients > 1.4 * apart.gradients, "the value model has no LM head"
    undone = plan(undo_updates=True)
    assert undone.undo == both.gradients + both.optimizer
    assert undone.peak == both.peak + undone.undo
    assert plan("cuda", undo_updates=True).undo == 0, "it is in host memory"


def test_the_command(place, capsys):
    tiny_config("llama", layers=4).save_pretrained("policy")
    rows = shown_by(capsys, "--memory", "0.0001")
    assert list(rows)[-6:] == [
        "reward model",
        "undo",
        "peak",
        "with a margin of 10%",
        "fits 0.0001 GB",
        "with a margin of 10%, computed in bfloat16",
    ]
    assert "3 top layers, a value head" in rows[""], "not 4: it has four layers"
    assert set(rows["fits 0.0001 GB"]) == {"no"}
    assert "LoRA of rank 16, a value head" in rows[""]


def test_the_command_shows_what_bfloat16_takes(place, capsys):
    both, bfloat16 = shown_by(capsys), shown_by(capsys, "--compute-dtype", "bfloat16")
    sums = both["with a margin of 10%, computed in bfloat16"]
    assert sums == bfloat16["with a margin of 10%"] != both["with a margin of 10%"]
    assert "with a margin of 10%, computed in bfloat16" not in bfloat16


def test_a_classifier_adds_its_weights_to_every_plan(place, capsys):
    judge = tiny_classifier(layers=4, hidden=512)
    judge.config.save_pretrained("judge")
    weights = sum(p.nbytes for p in judge.parameters())
    assert classifier_bytes(judge.config) == weights
    expected = f"{weights / 1e9:.2f}"
    assert float(expected) > 0
    assert set(shown_by(capsys, "--reward", "judge")["reward model"]) == {expected}
    assert set(shown_by(capsys, "--reward", "a:b")["reward model"]) == {"0.00"}
    size = {"batch_size": 4, "prompt_length": 8}
    without, plan = (
        plan_memory(tiny_config("llama"), PPOConfig(max_length=8), reward_bytes=n, **size)
        for n in (0, weights)
    )
    assert plan.peak == without.peak + weights


def test_samples_of_a_prompt_share_it_in_passes_and_in_the_trunk():
    config, sizes = tiny_config("llama"), {"prompt_length": 5}
    settings = {"critic": "baseline", "max_length": 7, "num_layers_unfrozen": 1}
    one = plan_memory(config, PPOConfig(**settings), batch_size=12, **sizes)
    grouped = PPOConfig(samples_per_prompt=4, **settings)
    found = plan_memory(config, grouped, batch_size=3, **sizes)
    assert found.trunk_states == one.trunk_states * (3 * 5 + 12 * 7) // (12 * (5 + 7))
    tokens, alone = 3 * 5 + 12 * (7 - 1), 12 * (5 + 7 - 1)
    assert found.activations == pytest.approx(one.activations * tokens / alone, rel=0.1)
    same = {"trunk_states": one.trunk_states, "activations": one.activations}
    assert replace(found, **same) == one
    padded = replace(grouped, padding_free=False)
    assert plan_memory(config, padded, batch_size=3, **sizes).activations > found.activations
