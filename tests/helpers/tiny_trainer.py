"""Trainers of tiny models, and what tests ask of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from ppo_fast import PPOConfig, PPOTrainer, RewardModel, ValueModel

PROMPTS = ["The film was", "She thought", "Nothing in this room", "There", "The train to the north"]


def count_letters(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that differs between almost all completions."""
    return [sum(map(ord, text)) % 97 / 50 + len(text) / 10 for text in completions]


def tiny_value_model(seed: int = 1) -> ValueModel:
    """Equal seeds, equal weights; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ValueModel(tiny_model(layers=1, hidden=32, seed=seed), 32)


def tiny_reward_model(seed: int = 2) -> RewardModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RewardModel(tiny_model(layers=1, hidden=32, seed=seed), 32)


def tiny_trainer(
    reward: Any = count_letters,
    *,
    critic: str = "model",
    layers: int = 2,
    hidden: int = 32,
    **options: Any,
) -> PPOTrainer:
    """A trainer whose weights depend on nothing but the arguments. One token in twelve ends a
    response, so that lengths differ."""
    policy = tiny_model(layers=layers, hidden=hidden)
    policy.generation_config.eos_token_id = list(range(0, VOCAB_SIZE, 12))
    settings: dict[str, Any] = {"max_length": 6, "learning_rate": 1e-3, "num_epochs": 2}
    return PPOTrainer(
        policy,
        tiny_value_model() if critic == "model" else None,
        reward,
        tiny_tokenizer(),
        "cpu",
        config=PPOConfig(**(settings | {"critic": critic} | options)),
    )


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """The names of the weights that are no longer, bit for bit, as they were."""
    now = module.state_dict()
    assert now.keys() == before.keys()
    return {name for name in now if not torch.equal(now[name], before[name])}


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics without those that the machine's speed and memory decide."""
    return {k: value for k, value in metrics.items() if not k.startswith(("time/", "perf/"))}


def true_logprobs(model: nn.Module, tokens: Any, temperature: float = 1.0) -> Tensor:
    """[B, T] float64: log-probs of the response tokens by the plain model, a row at a time and
    without padding; 0 beyond a response."""
    model = copy.deepcopy(model).double()
    out = torch.zeros(tokens.response_ids.shape, dtype=torch.float64)
    with torch.no_grad():
        for b, ids in enumerate(tokens.sequences()):
            p, n = int(tokens.prompt_lengths[b]), int(tokens.response_lengths[b])
            logits = model(input_ids=ids[None]).logits[0, p - 1 : -1] / temperature
            out[b, :n] = logits.log_softmax(-1).gather(1, ids[p:, None]).squeeze(1)
    return out


@contextmanager
def no_model_runs() -> Iterator[None]:
    """Within the block, calling any torch module is a failure."""

    def fail(module: nn.Module, args: Any) -> None:
        raise AssertionError(f"{type(module).__name__} was run")

    handle = nn.modules.module.register_module_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def one_line(error: Any) -> bool:
    """Of what pytest.raises caught."""
    return len(str(error.value).splitlines()) == 1


def names(folder: Path) -> list[str]:
    """The names of a folder's files; that of its lock begins with a dot."""
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def experience_of(trainer, scores=None, **options):
    rollout = trainer.rollout(PROMPTS, seeds=torch.arange(len(PROMPTS)), **options)
    return rollout, trainer.make_experience(rollout, scores)


def counted(trainer) -> dict[str, int]:
    """Return the numbers of optimizer steps from now on, by name."""
    steps = dict.fromkeys(trainer.learner.optimizers, 0)
    for name, optimizer in trainer.learner.optimizers.items():
        optimizer.register_step_post_hook(
            lambda *_, name=name: steps.update({name: steps[name] + 1})
        )
    return steps
