"""Errors that had no message, each found once in review."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, changed, count_letters, names, tiny_trainer, weights
from torch import nn
from transformers import PreTrainedModel

from ppo_fast import PPOConfig, PPOTrainer, RewardModel, ValueModel
from ppo_fast.critics.critic import HeadCritic
from ppo_fast.data.tokens import make_tokens
from ppo_fast.models.call_on_rows import call_on_rows
from ppo_fast.models.heads import ValueHead

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_in_train_mode_decodes_with_its_cache(family):
    policy = tiny_model(family)
    # the old name warns where there is the new one
    newer = getattr(policy, "activation_checkpointing_enable", None)
    (newer or policy.gradient_checkpointing_enable)()
    policy.train()
    config = PPOConfig(critic="head", max_length=6)
    trainer = PPOTrainer(policy, None, count_letters, tiny_tokenizer(), "cpu", config=config)
    assert trainer.train_step(PROMPTS)["first_max_log_ratio"] < 1e-4
    assert policy.training, "the mode comes back"


def test_ratios_that_do_not_start_at_one_are_a_warning(monkeypatch):
    trainer = tiny_trainer(critic="head")
    generate = trainer.engine.generate

    def wrong(*args, **kwargs):
        rollout = generate(*args, **kwargs)
        return replace(rollout, logprobs=2 * rollout.logprobs)

    monkeypatch.setattr(trainer.engine, "generate", wrong)
    with pytest.warns(UserWarning, match="ratios are not 1"):
        trainer.train_step(PROMPTS)


def test_gradients_from_before_a_step_are_ignored():
    clean, stained = tiny_trainer(critic="head"), tiny_trainer(critic="head")
    for parameter in stained.policy_model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    clean.train_step(PROMPTS)
    stained.train_step(PROMPTS)
    assert not changed(stained.policy_model, weights(clean.policy_model))


def test_value_and_reward_model_do_not_share_weights():
    base = tiny_model()
    models = (ValueModel(base, 64), RewardModel(base, 64))
    with pytest.raises(ValueError, match="reward_model: shares trained weights with value_model"):
        PPOTrainer(tiny_model(seed=1), *models, tiny_tokenizer(), "cpu")


def test_a_resumed_run_takes_its_learning_rate_from_the_config(tmp_path):
    first = tiny_trainer(critic="head", learning_rate=1e-3)
    first.train_step(PROMPTS)
    resumed = tiny_trainer(critic="head", learning_rate=1e-6)
    resumed.load_checkpoint(first.save_checkpoint(tmp_path, 1))
    assert resumed.policy_optimizer.param_groups[0]["lr"] == 1e-6
    assert resumed.policy_optimizer.state, "the moments are loaded"


def test_an_error_during_an_update_writes_no_checkpoint(tmp_path, monkeypatch, caplog):
    trainer = tiny_trainer()
    arguments = {"batch_size": 2, "checkpoint_dir": tmp_path, "checkpoint_freq": 2}
    trainer.train(PROMPTS, num_steps=3, progress=False, **arguments)
    monkeypatch.setattr("ppo_fast.learning.learner.Learner._step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train(PROMPTS, num_steps=1, progress=False, **arguments)
    assert names(tmp_path) == ["ppo_checkpoint_step_2.pt", "ppo_checkpoint_step_3.pt"]
    assert "newest checkpoint" in caplog.text


def test_nan_at_a_masked_state_reaches_no_gradient_of_the_head():
    critic = HeadCritic(ValueHead(3))
    tokens = make_tokens([[1], [1]], [[2, 3], [4]], 0, CPU)
    states = torch.randn(2, 2, 3)
    states[1, 1] = torch.nan
    critic.values(tokens, states).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in critic.module.parameters())


class LastPosition(PreTrainedModel):
    """A user's class that reads position -1 and ignores the mask."""

    config_class = None
    _supports_sdpa = True

    def __init__(self, base):
        super().__init__(base.config)
        self.base, self.head = base.base_model, nn.Linear(64, 1)

    def forward(self, input_ids, attention_mask=None):
        states = self.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(states[:, -1]).squeeze(-1)


class SpecRewardModel(RewardModel):
    def forward(self, input_ids, attention_mask=None):
        states = self.base_model.base_model(input_ids=input_ids).last_hidden_state
        return self.reward_head(states[:, -1]).squeeze(-1)


@pytest.mark.parametrize("make", [LastPosition, lambda base: SpecRewardModel(base, 64)])
def test_user_subclasses_of_padded_classes_get_no_padding(make):
    module = make(tiny_model()).eval()
    rows = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 4])]
    with torch.no_grad():
        together = call_on_rows(module, rows, max_tokens=100, what="m")
        alone = [call_on_rows(module, [row], max_tokens=100, what="m")[0] for row in rows]
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("per_token", [False, True])
def test_modules_that_squeeze_a_single_row(per_token):
    class Squeezing(nn.Module):
        def forward(self, ids, mask):
            out = ids.float()[..., None]
            return (out if per_token else out[:, -1]).squeeze()

    rows = [torch.tensor([5, 6, 7]), torch.tensor([9, 4])]
    found = call_on_rows(Squeezing(), rows, max_tokens=100, what="m")
    expected = [[5.0, 6.0, 7.0], [9.0, 4.0]] if per_token else [7.0, 4.0]
    assert [out.tolist() for out in found] == expected


def test_a_constant_reward_gives_no_advantage_at_any_discount():
    options = {"critic": "baseline", "gamma": 0.9, "kl_penalty": 0.0, "whiten_advantages": False}
    trainer = tiny_trainer(lambda prompts, completions: [1.0] * len(prompts), **options)
    experience = trainer.make_experience(trainer.rollout(PROMPTS))
    assert experience.advantages.abs().max() < 1e-6


def test_a_baseline_of_one_sequence_is_a_warning():
    with pytest.warns(UserWarning, match="batch of one"):
        tiny_trainer(critic="baseline").train_step(PROMPTS[:1])


def test_log_probs_of_samples_are_at_their_temperature():
    trainer = tiny_trainer()
    responses, sampled = trainer.generate_responses(PROMPTS, temperature=0.5)
    assert (trainer.get_logprobs(PROMPTS, responses) - sampled).abs().max() < 1e-4
    at_one = trainer.get_logprobs(PROMPTS, responses, temperature=1.0)
    assert (at_one - sampled).abs().max() > 1e-2


def test_a_checkpoint_without_a_part_changes_nothing(tmp_path):
    trainer = tiny_trainer()
    trainer.train_step(PROMPTS)
    path = trainer.save_checkpoint(tmp_path, 1)
    payload = torch.load(path, weights_only=True)
    del payload["random_states"]
    torch.save(payload, path)
    other = tiny_trainer()
    before = weights(other.policy_model)
    with pytest.raises(ValueError, match=r"damaged: it lacks \['random_states'\]"):
        other.load_checkpoint(path)
    assert not changed(other.policy_model, before)


def test_a_step_under_no_grad_trains():
    trainer = tiny_trainer()
    before = weights(trainer.policy_model)
    with torch.no_grad():
        trainer.train_step(PROMPTS)
    assert changed(trainer.policy_model, before)


def test_numpy_numbers_are_numbers():
    trainer = tiny_trainer(learning_rate=np.float32(1e-3), num_epochs=np.int64(1))
    result = trainer.train(PROMPTS, num_steps=np.int64(1), batch_size=np.int64(2), progress=False)
    assert len(result["training_history"]["mean_rewards"]) == 1


def test_a_model_without_an_lm_head_is_refused_as_policy():
    body = tiny_model().base_model
    with pytest.raises(TypeError, match="policy_model: LlamaModel is not a causal language model"):
        PPOTrainer(body, None, count_letters, tiny_tokenizer(), "cpu")


def test_an_impossible_checkpoint_folder_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    trainer = tiny_trainer()
    with pytest.raises(ValueError, match=r"checkpoint_dir: .* cannot be made a folder"):
        trainer.train(PROMPTS, num_steps=1, checkpoint_dir=tmp_path / "file", progress=False)
    assert trainer.stats["total_steps"] == 0


def test_values_that_are_not_finite_are_refused():
    trainer = tiny_trainer()
    nn.init.constant_(trainer.value_model.value_head[-1].bias, torch.nan)
    before = weights(trainer.policy_model)
    with pytest.raises(ValueError, match="value_model: returned NaN or infinity"):
        trainer.train_step(PROMPTS)
    assert not changed(trainer.policy_model, before)


def test_settings_are_attributes_by_the_names_of_the_classic_interface():
    trainer = tiny_trainer(gamma=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (trainer.gamma, trainer.clip_epsilon, trainer.gae_lambda) == (0.7, 0.2, 0.95)
        assert (trainer.kl_penalty, trainer.value_loss_coef, trainer.max_grad_norm) == (
            0.05,
            0.5,
            1,
        )
