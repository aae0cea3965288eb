"""Bad input: a clear error that names the argument, before any model runs, and nothing is lost."""

from __future__ import annotations

import copy

import pytest
from tiny_models import tiny_classifier, tiny_model, tiny_tokenizer
from tiny_trainer import (
    PROMPTS,
    changed,
    count_letters,
    no_model_runs,
    one_line,
    tiny_reward_model,
    tiny_trainer,
    tiny_value_model,
    weights,
)
from torch import nn

from ppo_fast import PPOConfig, PPOTrainer

# Construction


def no_pad_token():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


def larger_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"])
    return tokenizer


def two_devices():
    model = tiny_model(layers=1, hidden=32)
    model.lm_head.to("meta")
    return model


ON_META = r"lies on meta, but device=cpu; .*share one device: move it with \.to\('cpu'\)"
CONSTRUCTION = {
    "policy a string": (
        {"policy_model": lambda: "gpt2"},
        TypeError,
        r"policy_model: got str, expected .*AutoModelForCausalLM\.from_pretrained",
    ),
    "policy a bare module": (
        {"policy_model": lambda: nn.Linear(2, 2)},
        TypeError,
        r"policy_model: got Linear, expected a transformers causal language model",
    ),
    "policy elsewhere": (
        {"policy_model": lambda: tiny_model(layers=1, hidden=32).to("meta")},
        ValueError,
        rf"policy_model: {ON_META}",
    ),
    "policy on two devices": (
        {"policy_model": two_devices},
        ValueError,
        r"policy_model: its weights lie on several devices \['cpu', 'meta'\].*device_map",
    ),
    "value model elsewhere": (
        {"value_model": lambda: tiny_value_model().to("meta")},
        ValueError,
        rf"value_model: {ON_META}",
    ),
    "reward model elsewhere": (
        {"reward_model": lambda: tiny_reward_model().to("meta")},
        ValueError,
        r"reward_model: lies on meta, and has no weights; load them",
    ),
    "value model a function": (
        {"value_model": lambda: count_letters},
        TypeError,
        r"value_model: got function, .*torch\.nn\.Module",
    ),
    "reward model a number": (
        {"reward_model": lambda: 1.0},
        TypeError,
        r"reward_model: got float, expected a torch\.nn\.Module .* or a function",
    ),
    "no reward model": (
        {"reward_model": lambda: None},
        TypeError,
        r"reward_model: got NoneType, expected",
    ),
    "no pad token": (
        {"tokenizer": no_pad_token},
        ValueError,
        r"tokenizer: has no pad token; .*tokenizer\.pad_token = tokenizer\.eos_token",
    ),
    "ids beyond the vocabulary": (
        {"tokenizer": larger_tokenizer},
        ValueError,
        r"tokenizer: its largest id is 308, but policy_model has 307 embeddings; .*resize_token_em",
    ),
    "two labels": (
        {"reward_model": lambda: two_labels()},
        ValueError,
        r"reward_model: LlamaForSequenceClassification has num_labels=2, expected 1",
    ),
}


def two_labels():
    model = tiny_classifier(layers=1, hidden=32)
    model.config.num_labels = 2
    return model


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case):
    makers, error, message = CONSTRUCTION[case]
    arguments = {
        "policy_model": lambda: tiny_model(layers=1, hidden=32),
        "value_model": tiny_value_model,
        "reward_model": tiny_reward_model,
        "tokenizer": tiny_tokenizer,
    } | makers
    made = {name: make() for name, make in arguments.items()}
    with no_model_runs(), pytest.raises(error, match=message) as caught:
        PPOTrainer(**made, device="cpu")
    assert one_line(caught)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("clip_epsilon", 1.5),
        ("kl_penalty", -0.1),
        ("gamma", 1.01),
        ("gae_lambda", -0.5),
        ("value_loss_coef", -1.0),
        ("max_grad_norm", 0.0),
    ],
)
def test_arguments_out_of_range(name, value):
    with no_model_runs(), pytest.raises(ValueError, match=rf"^{name}: got {value}, expected "):
        PPOTrainer(
            tiny_model(layers=1, hidden=32),
            None,
            count_letters,
            tiny_tokenizer(),
            "cpu",
            **{name: value},
        )


def test_kl_whose_gradient_is_zero():
    with pytest.raises(ValueError, match=r'kl_estimator="k1" with kl_in="loss".*"k1\+k2"'):
        PPOConfig(kl_estimator="k1", kl_in="loss")


@pytest.mark.parametrize("layers", [2, 3])
def test_more_unfrozen_layers_than_there_are(layers):
    policy = tiny_model(hidden=32)
    message = rf"num_layers_unfrozen: got {layers}, expected 1 to 1 \(the model has 2 layers\)"
    with no_model_runs(), pytest.raises(ValueError, match=message):
        PPOTrainer(
            policy,
            None,
            count_letters,
            tiny_tokenizer(),
            "cpu",
            config=PPOConfig(num_layers_unfrozen=layers),
        )
    assert all(p.requires_grad for p in policy.parameters()), "nothing was changed"


class WrongShape(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(307, 3)

    def forward(self, input_ids, attention_mask):
        return self.embedding(input_ids)


def test_a_value_model_of_the_wrong_shape():
    message = r"value_model returned shape \[2, 3, 3\] for input_ids \[2, 3\]; expected \[2\] or"
    with pytest.raises(ValueError, match=message):
        PPOTrainer(
            tiny_model(layers=1, hidden=32), WrongShape(), count_letters, tiny_tokenizer(), "cpu"
        )


# Prompts and numbers, by every door


DOORS = {
    "train": lambda trainer, prompts, **numbers: trainer.train(
        prompts, progress=False, **({"num_steps": 2, "batch_size": 1} | numbers)
    ),
    "train_step": lambda trainer, prompts, **numbers: trainer.train_step(prompts, **numbers),
    "generate_responses": lambda trainer, prompts, **numbers: trainer.generate_responses(
        prompts, **numbers
    ),
    "rollout": lambda trainer, prompts, **numbers: trainer.rollout(prompts, **numbers),
}
LONG = "z" * 125
BAD_PROMPTS = {
    "none": ([], ValueError, r"prompts: got an empty list, expected at least one prompt"),
    "one string": ("The film", TypeError, r"prompts: got one string.*pass \[prompt\]"),
    "nothing": (None, TypeError, r"prompts: got NoneType, expected a list of strings"),
    "a number": (3, TypeError, r"prompts: got int, expected a list of strings"),
    "not a string": ([*PROMPTS, 3], TypeError, r"prompts\[5\]: got int, expected a string"),
    "None among them": ([None, *PROMPTS], TypeError, r"prompts\[0\]: got NoneType, expected a str"),
    "empty": ([*PROMPTS, ""], ValueError, r"prompts\[5\]: '' is empty after tokenisation; remove"),
    "too long": (
        [*PROMPTS, LONG],
        ValueError,
        r"prompts\[5\]: 'z{57}\.\.\.' has 125 tokens; with max_length=6 that exceeds "
        r"policy_model's context of 128; .*lower max_length to 3",
    ),
}


def untouched(trainer, call, error, message):
    """``call`` fails so, before any model runs, and leaves the trainer as it was."""
    policy, stats = weights(trainer.policy_model), copy.deepcopy(trainer.stats)
    counters = trainer.progress.prompts_drawn, trainer.progress.sequences_sampled
    with no_model_runs(), pytest.raises(error, match=message) as caught:
        call()
    assert one_line(caught)
    assert not changed(trainer.policy_model, policy)
    assert trainer.stats == stats
    assert (trainer.progress.prompts_drawn, trainer.progress.sequences_sampled) == counters


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_prompts(door, case):
    prompts, error, message = BAD_PROMPTS[case]
    trainer = tiny_trainer()
    untouched(trainer, lambda: DOORS[door](trainer, prompts), error, message)


def test_a_prompt_that_just_fits():
    trainer = tiny_trainer()
    assert len(trainer.tokenizer(LONG)["input_ids"]) == 125
    trainer.rollout([LONG], max_length=3)
    untouched(trainer, lambda: trainer.rollout([LONG], max_length=4), ValueError, "context of 128")


def test_train_needs_max_length_to_fit_every_prompt():
    trainer = tiny_trainer()
    message = r"prompts\[\d\]: .* with max_length=127 .*lower max_length to"

    def train():
        DOORS["train"](trainer, PROMPTS, max_length=127)

    untouched(trainer, train, ValueError, message)


NUMBERS = [
    *(
        ("max_length", value, ("train", "train_step", "generate_responses", "rollout"))
        for value in (0, -5, 2.5)
    ),
    *(
        ("temperature", value, ("train", "train_step", "generate_responses", "rollout"))
        for value in (0, 0.0, -1.0, NAN, INF)
    ),
    *(("num_epochs_per_batch", value, ("train", "train_step")) for value in (0, -1, 1.5)),
    *(("num_steps", value, ("train",)) for value in (0, -1, 2.0)),
    *(("batch_size", value, ("train",)) for value in (0, -4, 1.5)),
    *(("checkpoint_freq", value, ("train",)) for value in (0, -1)),
]


@pytest.mark.parametrize(
    ("door", "name", "value"),
    [(door, name, value) for name, value, doors in NUMBERS for door in doors],
)
def test_numbers_out_of_range(door, name, value):
    trainer = tiny_trainer()
    message = rf"^{name}: got {value}, expected .*(1|above 0)"
    untouched(trainer, lambda: DOORS[door](trainer, PROMPTS, **{name: value}), ValueError, message)


def test_update_without_epochs():
    trainer = tiny_trainer()
    experience = trainer.make_experience(trainer.rollout(PROMPTS))
    untouched(
        trainer,
        lambda: trainer.update(experience, num_epochs_per_batch=0),
        ValueError,
        "num_epochs_per_batch: got 0, expected a whole number of at least 1",
    )
