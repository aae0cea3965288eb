"""Training above the frozen trunk: the critic's own top layers, and their checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_batch import batch
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters, tiny_trainer, weights
from torch import nn

from ppo_fast import PPOConfig, PPOTrainer
from ppo_fast.checkpointing import checkpoint
from ppo_fast.critics.critic import TopCritic
from ppo_fast.data.tokens import position_ids
from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.models.heads import TopValue, ValueHead
from ppo_fast.models.language_model import LanguageModel

TOKENS = batch()


def test_trunk_states_have_no_padding():
    padded = (
        torch.arange(1, 1 + TOKENS.input_ids.numel()).view(3, -1, 1)
        * TOKENS.attention_mask[..., None]
    )
    trunk_states = TrunkStates.pack(padded, TOKENS, whole=True)
    assert trunk_states.states[:, 0].tolist() == [n for n in padded.flatten().tolist() if n]
    for rows in ([0, 1, 2], [1], [2, 0]):
        index = torch.tensor(rows)
        part = TOKENS.select(index)
        found = trunk_states.select(index).padded(part)[part.attention_mask.bool()]
        expected = padded[index, : part.input_ids.shape[1]][part.attention_mask.bool()]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_values_from_the_trunk_are_those_of_the_whole_body(family):
    policy = LanguageModel(tiny_model(family, layers=3), num_layers_unfrozen=1)
    module = TopValue(copy.deepcopy(policy.body), 64)
    nn.init.normal_(module.head.linear.weight)
    critic = TopCritic(module, 1)
    values = critic.values(TOKENS, trunk_states=policy.compute_trunk_states(TOKENS))
    torch.testing.assert_close(values, critic.values(TOKENS), rtol=1e-4, atol=1e-5)
    for row, (ids, p) in enumerate(zip(TOKENS.sequences(), TOKENS.prompt_lengths, strict=True)):
        states = module.body(input_ids=ids[None]).last_hidden_state[0]
        expected = module.head(states)[p - 1 : -1]
        torch.testing.assert_close(values[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)
        assert (values[row, len(expected) :] == 0).all()


class WholeValue(nn.Module):
    """The value function of TopCritic as a user would write it, with frozen lower layers."""

    def __init__(self, policy: nn.Module, k: int) -> None:
        super().__init__()
        self.body, self.head = copy.deepcopy(policy.base_model), ValueHead(64)
        self.body.requires_grad_(False)
        for module in (*self.body.layers[-k:], self.body.norm):
            module.requires_grad_(True)

    def forward(self, input_ids, attention_mask):
        out = self.body(input_ids, attention_mask, position_ids=position_ids(attention_mask))
        return self.head(out.last_hidden_state)


@pytest.mark.parametrize("k", [1, 2])
def test_a_top_is_trained_as_a_value_model_with_a_frozen_bottom(k):
    settings = {"max_length": 6, "learning_rate": 1e-3, "num_layers_unfrozen": k}
    trainers = []
    for critic in ("top", "model"):
        policy = tiny_model(layers=3)
        value_model = WholeValue(policy, k) if critic == "model" else None
        config = PPOConfig(critic=critic, **settings)
        trainer = PPOTrainer(
            policy, value_model, count_letters, tiny_tokenizer(), "cpu", config=config
        )
        trainers.append((trainer, [trainer.train_step(PROMPTS) for _ in range(3)]))
    (top, found), (whole, expected) = trainers
    for mine, other in zip(found, expected, strict=True):
        for name in ("policy_loss", "value_loss", "explained_variance", "kl_divergence"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    for one, two in (
        (top.policy_model, whole.policy_model),
        (top.critic.module, whole.critic.module),
    ):
        for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=name)


def test_one_trunk_serves_policy_reference_and_critic():
    trainer = tiny_trainer(critic="top", num_layers_unfrozen=1, layers=3)
    models = (trainer.policy_model.model, trainer.reference_model.model, trainer.critic.module.body)
    first, last = ([m.layers[i].mlp.up_proj.weight for m in models] for i in (0, 2))
    assert len({w.data_ptr() for w in first}) == 1
    assert len({w.data_ptr() for w in last}) == 3
    assert len({m.embed_tokens.weight.data_ptr() for m in models}) == 1
    before = weights(trainer.critic.module)
    trainer.train_step(PROMPTS)
    now = trainer.critic.module.state_dict()
    moved = {name for name in before if not torch.equal(before[name], now[name])}
    assert moved
    assert all(name.startswith(("body.layers.2", "body.norm", "head")) for name in moved)


def test_a_top_needs_a_trunk():
    with pytest.raises(ValueError, match="set num_layers_unfrozen, or use critic='model'"):
        PPOConfig(critic="top")


@pytest.mark.parametrize("critic", ["head", "top"])
def test_a_trunk_kept_in_half_precision(critic):
    options = {"num_layers_unfrozen": 1, "layers": 3, "critic": critic}
    exact, trainer = tiny_trainer(**options), tiny_trainer(trunk_dtype="bfloat16", **options)
    rollout = trainer.rollout(PROMPTS, seeds=trainer.progress.next_seeds(len(PROMPTS)))
    assert rollout.trunk_states.states.dtype == torch.float32
    experience = trainer.make_experience(rollout)
    assert experience.trunk_states.states.dtype == torch.bfloat16
    metrics = trainer.update(experience)
    assert metrics["first_max_log_ratio"] < 1e-5, "old log-probs are of the same states"
    expected = exact.train_step(PROMPTS)
    assert metrics["mean_reward"] == expected["mean_reward"]
    assert metrics["policy_grad_norm"] == pytest.approx(expected["policy_grad_norm"], rel=0.05)
    assert metrics["value_loss"] == pytest.approx(expected["value_loss"], rel=0.05)


@pytest.mark.parametrize(
    ("critic", "k"), [("model", None), ("head", None), ("model", 2), ("head", 2), ("top", 2)]
)
def test_gradient_checkpointing_changes_memory_alone(critic, k):
    trained, runs = [], []
    for on in (False, True):
        trainer = tiny_trainer(
            critic=critic, num_layers_unfrozen=k, layers=3, gradient_checkpointing=on
        )
        top, count = trainer.policy_model.model.layers[-1].mlp, [0]
        top.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        experience = trainer.make_experience(trainer.rollout(PROMPTS))
        count[0] = 0
        trainer.update(experience)
        runs.append(count[0])
        trained.append(weights(trainer.policy_model) | weights(trainer.critic.module))
    assert runs[1] == 2 * runs[0] > 0
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_gradient_checkpointing_needs_a_model_that_can():
    class Values(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(400))

        def forward(self, input_ids, attention_mask):
            return self.weight[input_ids]

    config = PPOConfig(gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"gradient_checkpointing: value_model \(Values\) holds"):
        PPOTrainer(tiny_model(), Values(), count_letters, tiny_tokenizer(), "cpu", config=config)


def test_fused_adamw_is_adamw():
    trained = {}
    for adamw in ("foreach", "fused"):
        trainer = tiny_trainer(adamw=adamw)
        trainer.train_step(PROMPTS)
        trained[adamw] = weights(trainer.policy_model)
    for name, weight in trained["foreach"].items():
        torch.testing.assert_close(trained["fused"][name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_a_checkpoint_holds_what_is_trained_and_knows_its_base(tmp_path):
    options = {"critic": "top", "num_layers_unfrozen": 1, "layers": 3}
    trainer = tiny_trainer(**options)
    trainer.train_step(PROMPTS)
    path = trainer.save_checkpoint(tmp_path, 1)
    models = checkpoint.load(path)["models"]
    for name, part in (("policy", "model."), ("value", "body.")):
        names = {key for key in models[name] if key.startswith(part)}
        assert names
        assert all(key.startswith((f"{part}layers.2", f"{part}norm")) for key in names)

    resumed = tiny_trainer(**options)
    assert resumed.load_checkpoint(path) == 1
    for module in ("policy_model", "reference_model"):
        for name, weight in weights(getattr(trainer, module)).items():
            assert torch.equal(getattr(resumed, module).state_dict()[name], weight), name

    other = tiny_trainer(**options)
    with torch.no_grad():
        other.policy_model.model.layers[0].mlp.up_proj.weight += 1.0
    before = weights(other.policy_model)
    with pytest.raises(ValueError, match="other frozen weights than the trainer's"):
        other.load_checkpoint(path)
    assert all(torch.equal(before[n], w) for n, w in weights(other.policy_model).items())
