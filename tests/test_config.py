"""PPOConfig: ranges, presets, and the meaning of None."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import pydoc
import re
from dataclasses import FrozenInstanceError, fields, replace
from fractions import Fraction

import pytest

from ppo_fast import PPOTrainer
from ppo_fast.config import PPOConfig
from ppo_fast.config.class_doc import ClassDoc

NAN, INF = math.nan, math.inf

OUT_OF_RANGE = {
    "learning_rate": [0.0, -1e-5, NAN, INF, 1e38, "fast"],
    "value_learning_rate": [0.0, -1e-5, NAN, INF, 2.0],
    "clip_epsilon": [0.0, 1.0, -0.2, NAN],
    "clip_epsilon_high": [0.0, -0.2, NAN, INF],
    "dual_clip": [1.0, 0.0, -3.0, NAN],
    "value_clip": [0.0, -0.2, NAN, INF],
    "kl_penalty": [-0.1, NAN, INF],
    "kl_in": ["advantage", None],
    "kl_estimator": ["k4", "K1"],
    "gamma": [-0.1, 1.01, NAN],
    "gae_lambda": [-0.1, 1.01, NAN],
    "value_loss_coef": [-0.5, NAN, INF],
    "entropy_coef": [NAN, INF, -INF],
    "max_grad_norm": [0.0, -1.0, NAN],
    "num_epochs": [0, -1, 1.5, True],
    "num_minibatches": [0, -1, 2.0],
    "microbatch_tokens": [0, 1e4],
    "forward_batch_tokens": [0, 1e4],
    "padding_free": ["yes", None],
    "aggregation": ["mean", None],
    "critic": ["value", True],
    "trunk_dtype": ["float32", "float16"],
    "compute_dtype": ["float32", "float16"],
    "trained_weights": ["bfloat16", None],
    "adamw": ["slow", None],
    "gradient_checkpointing": ["yes", None],
    "num_layers_unfrozen": [0, -1, 1.5, True],
    "adam_betas": [(1.0, 0.999), (0.9, 1.0), (-0.1, 0.999), (0.9, NAN), (0.9,), 0.9],
    "adam_eps": [0.0, -1e-8, 1e-50, NAN],
    "weight_decay": [-0.1, NAN, INF, 1e38],
    "on_nonfinite": ["ignore", None],
    "max_skipped": [-1, 0.5],
    "max_length": [0, -5, 1.0],
    "max_prompt_length": [0, -1, 1.5, True],
    "long_prompts": ["cut ", "truncate", None],
    "reward_weights": [(1.0, NAN), (INF,), ("1",), 1.0],
    "temperature": [0.0, -1.0, NAN, INF, 1e-11, 1e11, 1e-320, 1e308],
    "top_k": [-1, 2.5, True],
    "min_new_tokens": [-1, 0.5, 151],
    "stop_token_ids": [2, "2", (2.0,)],
    "stop_strings": ["stop", (3,), ("",)],
    "rollout_slots": [0, 1.5],
    "kv_cache_dtype": ["float32", "float16", "int8"],
    "rollout_weights": ["int4", "float32", True],
    "kept_rollout_bytes": [-1, 0.5],
    "offload": ["optimizer", ("value",), ("reference", 1), None],
    "top_p": [0.0, 1.1, -0.5, NAN],
    "seed": [-1, 2**31, 0.5],
    "lr_schedule": ["exponential", None],
    "lr_warmup": [-1, 1.5, NAN, True],
    "lr_floor": [-0.1, 1.0],
    "schedule_steps": [0, 1.5],
    "objective": ["ppo", None],
    "ratio": ["sentence", None],
    "ratio_to": ["new", None],
    "importance": ["clip", True],
    "importance_range": [(2.0, 0.5), (-1.0, 2.0), (1.0,), 2.0, (0.0, NAN)],
    "value_huber": [0.0, -1.0, NAN],
    "kl_controller": ["pid", None],
    "kl_target": [0.0, -1.0],
    "kl_horizon": [0, 0.5],
    "kl_penalty_end": [-0.1, NAN],
    "gae_lambda_value": [-0.1, 1.1],
    "gae_length_alpha": [0.0, -1.0, 0.001],
    "entropy_bonus_share": [0.0, 1.1],
    "loss_token_share": [0.0, 1.1],
    "entropy_target": [0.0, -1.0],
    "entropy_coef_step": [0.0, NAN],
    "value_epochs": [0, 1.5],
    "target_kl": [0.0, NAN],
    "critic_warmup_steps": [-1, 0.5],
    "frozen": ["*.bias", (3,)],
    "value_frozen": ["*.bias", (3,)],
    "samples_per_prompt": [0, 1.5],
    "max_resampled_batches": [-1, 0.5],
    "reward_normalization": ["all", True],
    "reward_scale": [NAN, INF],
    "reward_clip": [0.0, -1.0],
    "missing_eos_penalty": [-1.0, NAN],
    "overlong_buffer": [-1, 151, 0.5],
    "overlong_penalty": [-1.0, NAN],
    "mask_truncated": [1, None],
}
# Settings that do not fit one another, and what is said of it.
TOGETHER = {
    "needs kl_target; got None": {"kl_controller": "adaptive"},
    "needs kl_penalty_end; got None": {"kl_controller": "linear"},
    "kl_target: is for kl_controller='adaptive', got 'fixed'": {"kl_target": 6.0},
    "kl_penalty: got 0 with kl_controller='adaptive'": {
        "kl_controller": "adaptive", "kl_target": 6.0, "kl_penalty": 0,
    },
    "critic='group_mean' compares the samples of a prompt": {"critic": "group_mean"},
    "critic='group_norm' compares the samples of a prompt": {"critic": "group_norm"},
    "reward_normalization='group' compares": {"reward_normalization": "group"},
    "max_resampled_batches=2 compares": {"max_resampled_batches": 2},
    "gae_length_alpha: got 0.1; 1 - 1 / \\(alpha \\* length\\) is negative": {
        "gae_length_alpha": 0.1, "max_length": 9,
    },
    "lr_floor: got 0.1 with lr_schedule='linear'": {"lr_floor": 0.1, "lr_schedule": "linear"},
    "critic_warmup_steps: got 5, expected fewer than schedule_steps=5": {
        "critic_warmup_steps": 5, "schedule_steps": 5,
    },
    "dual_clip: objective='mask' has no second clip": {"dual_clip": 3.0, "objective": "mask"},
    "importance: got 'mask' with ratio_to='sampler'": {
        "importance": "mask", "ratio_to": "sampler",
    },
    "target_kl: got 0.1 with ratio_to='sampler'": {"target_kl": 0.1, "ratio_to": "sampler"},
    "entropy_bonus_share: got 0.2, but there is no bonus": {"entropy_bonus_share": 0.2},
    "value_frozen: critic='head' has no layers": {"critic": "head", "value_frozen": ("*",)},
}  # fmt: skip
ALLOWED = {
    "value_learning_rate": [None, 1e-3],
    "clip_epsilon_high": [None, 0.28, 5.0],
    "dual_clip": [None, 3.0],
    "value_clip": [None, 0.2],
    "kl_penalty": [0.0, 0],
    "gamma": [0.0, 1.0, 0, 1],
    "gae_lambda": [0.0, 1.0],
    "entropy_coef": [-0.01, 0.01],
    "max_grad_norm": [INF, 1],
    "num_layers_unfrozen": [None, 1],
    "adam_betas": [(0.0, 0.0), (0.9, 0.95)],
    "top_k": [0, 50],
    "top_p": [1.0, 1],
    "seed": [0, 2**31 - 1],
    "critic": [None, "model", "head", "baseline"],
    "max_length": [1],
    "lr_warmup": [0, 0.5, 10, 10.0],
    "importance_range": [(0.0, 2.0), (0.5, 5), (0.2, INF)],
    "reward_scale": [-1.0, 0.0],
    "gae_length_alpha": [None, 0.05],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected ") as caught:
        PPOConfig(**{name: value})
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected "):
        replace(PPOConfig(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ALLOWED.items() for value in values]
)
def test_edges_of_the_ranges_are_allowed(name, value):
    assert getattr(PPOConfig(**{name: value}), name) == value


def test_every_field_with_a_range_is_tested():
    assert {f.name for f in fields(PPOConfig)} - set(OUT_OF_RANGE) == {
        "whiten_advantages",
        "check_gradients_together",
        "undo_updates",
        "cuda_graphs",
        "skip_special_tokens",
    }


def test_k1_in_the_loss_is_refused_with_alternatives():
    with pytest.raises(ValueError, match=r'kl_estimator="k1".*k1\+k2.*kl_in="reward"'):
        PPOConfig(kl_in="loss", kl_estimator="k1")
    PPOConfig(kl_in="reward", kl_estimator="k1")
    PPOConfig(kl_in="loss", kl_estimator="k3")


def test_estimator_follows_where_the_kl_is():
    assert PPOConfig(kl_in="reward").estimator() == "k1"
    assert PPOConfig(kl_in="loss").estimator() == "k1+k2"
    assert PPOConfig(kl_in="reward", kl_estimator="k3").estimator() == "k3"


def test_clip_range_is_symmetric_unless_told_otherwise():
    assert PPOConfig(clip_epsilon=0.1).clip == (0.1, 0.1)
    assert PPOConfig(clip_epsilon=0.1, clip_epsilon_high=0.3).clip == (0.1, 0.3)


def test_default_preset():
    config = PPOConfig()
    assert (config.gamma, config.gae_lambda) == (1.0, 0.95)
    assert (config.kl_penalty, config.kl_in) == (0.05, "reward")
    assert (config.clip, config.value_clip) == ((0.2, 0.2), 0.2)
    assert (config.num_epochs, config.num_minibatches) == (4, 1)
    assert (config.adam_eps, config.max_grad_norm) == (1e-5, 1.0)
    assert config.whiten_advantages
    assert (config.temperature, config.top_k, config.top_p) == (1.0, 0, 1.0)


def test_spec_preset():
    spec = PPOConfig.spec()
    assert spec.learning_rate == 1e-5
    assert (spec.clip, spec.value_clip, spec.dual_clip) == ((0.2, 0.2), None, None)
    assert (spec.kl_penalty, spec.kl_in, spec.estimator()) == (0.1, "loss", "k1+k2")
    assert (spec.gamma, spec.gae_lambda) == (0.99, 0.95)
    assert (spec.value_loss_coef, spec.entropy_coef, spec.max_grad_norm) == (0.5, 0.0, 1.0)
    assert (spec.adam_eps, spec.adam_betas, spec.weight_decay) == (1e-8, (0.9, 0.999), 0.0)
    assert (spec.num_epochs, spec.max_length, spec.temperature) == (4, 150, 1.0)


def test_spec_differs_in_nothing_else():
    default, spec = PPOConfig(), PPOConfig.spec()
    changed = {f.name for f in fields(spec) if getattr(spec, f.name) != getattr(default, f.name)}
    assert changed == {"gamma", "kl_penalty", "kl_in", "value_clip", "adam_eps"}


@pytest.mark.parametrize("name", ["clip_epsilon", "gamma", "gae_lambda", "top_p", "max_grad_norm"])
def test_a_setting_that_is_not_a_number_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name}: got '0.5', expected a number"):
        PPOConfig(**{name: "0.5"})


def test_help_shows_every_field_with_its_default_and_docstring():
    documented = inspect.getdoc(PPOConfig)
    assert documented.startswith("Settings of a PPO run.")
    assert (
        "\n    gamma (float, default 1.0): Discount per token. 1: a response's score" in documented
    )
    flat = " ".join(documented.split())
    for name, value in ((f.name, f.default) for f in fields(PPOConfig)):
        assert re.search(rf" {name} \([^:]*, default {re.escape(repr(value))}\): \w*\S", flat), name
    shown = pydoc.plain(pydoc.render_doc(PPOConfig))
    assert "AdamW step size of the policy." in shown
    assert PPOConfig().__doc__ == PPOConfig.__doc__


def test_without_its_source_the_class_has_its_own_docstring(monkeypatch):
    def no_source(_):
        raise OSError("could not get source code")

    class Settings:
        """One line."""

    monkeypatch.setattr(inspect, "getsource", no_source)
    assert ClassDoc(Settings).text == "One line."


def test_config_does_not_change_after_its_checks():
    with pytest.raises(FrozenInstanceError):
        PPOConfig().gamma = 2.0


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("learing_rate", "PPOConfig: got an unknown argument 'learing_rate'; .* learning_rate"),
        ("num_ppo_epochs", "did you mean num_epochs?"),
        ("cliprange", "did you mean clip_epsilon?"),
        ("banana", "'banana'; it takes learning_rate, value_learning_rate, "),
    ],
)
def test_an_unknown_argument_names_what_was_meant(name, match):
    with pytest.raises(TypeError, match=match):
        PPOConfig(**{name: 1})


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("args", r"PPOTrainer: got an unknown argument 'args'; did you mean config=PPOConfig\("),
        ("ref_model", "did you mean reference_model?"),
        ("processing_class", "did you mean tokenizer?"),
    ],
)
def test_trainer_arguments_of_trl(name, match):
    with pytest.raises(TypeError, match=match):
        PPOTrainer(None, None, None, None, "cpu", **{name: 1})


def test_signatures_are_those_of_the_classes():
    names = [f.name for f in fields(PPOConfig)]
    assert list(inspect.signature(PPOConfig).parameters) == names
    trainer = inspect.signature(PPOTrainer).parameters
    assert list(trainer)[:5] == [
        "policy_model", "value_model", "reward_model", "tokenizer", "device"
    ]  # fmt: skip
    config = PPOConfig(gamma=0.5)
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


@pytest.mark.parametrize("setting", [{"learning_rate": 10**400}, {"max_length": 10**30}])
def test_numbers_too_large_for_torch(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}: got 1000000"):
        PPOConfig(**setting)


@pytest.mark.parametrize(("words", "settings"), TOGETHER.items(), ids=str)
def test_settings_that_do_not_fit_one_another(words, settings):
    with pytest.raises(ValueError, match=words):
        PPOConfig(**settings)


@pytest.mark.parametrize("preset", [PPOConfig.sao, PPOConfig.rloo, PPOConfig.grpo])
def test_settings_override_a_preset(preset):
    assert preset(learning_rate=0.5, num_epochs=3).learning_rate == 0.5
    with pytest.raises(TypeError, match="unknown argument 'learning_rat'; did you mean"):
        preset(learning_rat=0.5)


def test_fractions_become_floats():
    """torch's optimizers take none."""
    config = PPOConfig(learning_rate=Fraction(1, 4), reward_weights=[Fraction(1, 2), 1])
    assert (config.learning_rate, config.reward_weights) == (0.25, (0.5, 1))
    assert type(config.learning_rate) is float
    with pytest.raises(ValueError, match="learning_rate: got Fraction"):
        PPOConfig(learning_rate=Fraction(10**400, 3))
