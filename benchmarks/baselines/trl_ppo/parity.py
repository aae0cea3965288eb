"""Check that TRL's PPOTrainer and ours get the same losses and weights from the same rollouts.

`make baselines` runs it; alone: `.venv-trl-ppo/bin/python benchmarks/baselines/trl_ppo/parity.py`.

Policy, reference and value model are tiny random Llamas in float32. Both trainers are given the
responses and visit rows in order. Two settings are mapped: TRL never clips gradients
(max_grad_norm=inf), and its vf_coef is our value_loss_coef, for both halve the squared error. Where
every response has its full length all numbers agree to rounding.

Where EOS ends a response early they do not agree: TRL puts the score a token after EOS, at a
position where its value function is evaluated and trained, but its policy is not. So at EOS and
before it the score is discounted by lambda once more, and the value loss has one token more a
response. The script shows this for the policy, which agrees again when our advantages have the
score there too. For the value loss it only prints that TRL's has a token more.

The comparison does not show these differences of TRL: it divides logits by temperature + 1e-7 (a
rounding error here); it finds padding by id, so that a pad token equal to EOS hides every EOS (here
they differ); its metrics count padding, whose log-probs it sets to 1 (losses are compared here).
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from trl.experimental.ppo import ppo_trainer
from trl_side import SumOfIds, make_trainer, value_model_of

from ppo_fast import PPOConfig, PPOTrainer
from ppo_fast.data.experience import Experience
from ppo_fast.data.tokens import make_tokens
from ppo_fast.learning import learner
from ppo_fast.ops import gae, whiten
from ppo_fast.rollout import Rollout

sys.path.append(str(Path(__file__).parents[3] / "tests" / "helpers"))
from tiny_models import EOS_ID, PAD_ID, VOCAB_SIZE, tiny_model, tiny_tokenizer

ROWS, NEW = 8, 12
# AdamW's epsilon is about as large as the gradients: steps show their scale, and little rounding.
RATE, EPSILON, TEMPERATURE = 1e-3, 1e-3, 0.7
KL, GAMMA, LAMBDA, CLIP, VALUE_COEF = 0.2, 1.0, 0.95, 0.2, 0.1
# Rounding in float32 over the steps: of losses, and of weights relative to their largest change.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 5e-6, 5e-4

Ids = list[list[int]]


@dataclass
class Run:
    """The results of one side: its losses by optimizer step, and its final weights."""

    policy_losses: list[float]
    value_losses: list[float]
    policy: dict[str, Tensor]
    values: dict[str, Tensor]


@dataclass
class Models:
    policy: Any
    reference: Any
    values: Any


class TokenValues(nn.Module):
    """TRL's value model in the form that our trainer takes: a value a token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.inner.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.inner.score(states)[..., 0]


def make_models() -> Models:
    torch.manual_seed(0)
    policy = tiny_model("llama")
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for weight in reference.parameters():
            weight += 0.01 * torch.randn_like(weight)
    return Models(policy, reference, value_model_of(policy).eval())


def make_prompts() -> Ids:
    generator = torch.Generator().manual_seed(1)
    lengths = [3 + row % 5 for row in range(ROWS)]
    return [torch.randint(2, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def make_responses(lengths: list[int]) -> Ids:
    """Make responses. Those shorter than NEW end with EOS; no other token is EOS or padding."""
    generator = torch.Generator().manual_seed(2)
    responses = torch.randint(2, VOCAB_SIZE, (ROWS, NEW), generator=generator).tolist()
    pairs = zip(responses, lengths, strict=True)
    return [ids if n == NEW else [*ids[: n - 1], EOS_ID] for ids, n in pairs]


@contextmanager
def recorded(module: Any, name: str, kept: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """Within the block, collect ``kept`` of each result of ``module.name``, unless it is None."""
    function, found = getattr(module, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if (it := kept(result)) is not None:
            found.append(it)
        return result

    with mock.patch.object(module, name, call):
        yield found


def by_trl(
    models: Models, prompts: Ids, responses: Ids, epochs: int, minibatches: int
) -> tuple[Run, list[int]]:
    """Train with TRL; return its run, and the order in which it took the prompts."""
    models, order = copy.deepcopy(models), []

    def given(model: Any, queries: Tensor, _: int, pad_id: int, __: Any) -> tuple[Tensor, Tensor]:
        asked = [[i for i in row if i != pad_id] for row in queries.tolist()]
        order.extend(prompts.index(row) for row in asked)
        rows = [responses[i] + [pad_id] * (NEW - len(responses[i])) for i in order]
        ids = torch.cat([queries, torch.tensor(rows)], dim=1)
        logits = ppo_trainer.forward(model, ids, pad_id).logits[:, -NEW - 1 : -1]
        return ids, logits / (TEMPERATURE + 1e-7)

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            models.policy, models.reference, models.values, tiny_tokenizer(), prompts, folder,
            learning_rate=RATE, adam_epsilon=EPSILON, temperature=TEMPERATURE, kl_coef=KL,
            gamma=GAMMA, lam=LAMBDA, cliprange=CLIP, cliprange_value=CLIP, vf_coef=VALUE_COEF,
            response_length=NEW, stop_token="eos", num_ppo_epochs=epochs,
            num_mini_batches=minibatches,
        )  # fmt: skip
        # only the means of the two losses have gradients: the value loss, not yet halved, is first
        losses = recorded(
            ppo_trainer, "masked_mean", lambda x: float(x) if x.requires_grad else None
        )
        with (
            mock.patch.object(ppo_trainer, "batch_generation", torch.no_grad()(given)),
            mock.patch.object(np.random, "permutation", np.arange),
            losses as found,
        ):
            trainer.train()
    weights = models.policy.state_dict(), models.values.state_dict()
    return Run(found[1::2], [0.5 * it for it in found[::2]], *weights), order


def by_ours(
    models: Models, prompts: Ids, responses: Ids, epochs: int, minibatches: int, late: bool = False
) -> Run:
    """Train with ppo_fast. ``late``: the score sits one token after EOS, as in TRL."""
    models = copy.deepcopy(models)
    config = PPOConfig.trl(
        learning_rate=RATE, lr_scheduler_type="constant", adam_epsilon=EPSILON, bf16=False,
        gradient_checkpointing=False, temperature=TEMPERATURE, kl_coef=KL, gamma=GAMMA, lam=LAMBDA,
        cliprange=CLIP, cliprange_value=CLIP, vf_coef=VALUE_COEF, response_length=NEW,
        num_ppo_epochs=epochs, num_mini_batches=minibatches,
    )  # fmt: skip
    trainer = PPOTrainer(
        models.policy,
        TokenValues(models.values),
        lambda prompts, completions: [0.0] * len(prompts),
        tiny_tokenizer(),
        "cpu",
        config=config,
    )
    trainer.reference_model.load_state_dict(models.reference.state_dict())
    tokens = make_tokens(prompts, responses, PAD_ID, trainer.device)
    texts = [""] * ROWS
    unknown = torch.zeros(tokens.response_ids.shape)
    finished = tokens.response_lengths < NEW
    rollout = Rollout(
        tokens, None, unknown, finished, config.sampling(), prompts=texts, completions=texts
    )
    body = SumOfIds().body
    scores = [float(body(row[None]).hidden_states[0][0, -1, 0]) for row in tokens.sequences()]
    experience = trainer.make_experience(rollout, scores)
    if late:
        experience = with_late_score(experience, trainer.value_model)
    with (
        mock.patch.object(torch, "randperm", lambda n, **_: torch.arange(n)),
        recorded(learner, "ppo_loss", lambda result: float(result[0])) as policy_losses,
        recorded(learner, "value_loss", lambda result: float(result[0])) as value_losses,
    ):
        trainer.update(experience)
    weights = models.policy.state_dict(), models.values.state_dict()
    return Run(policy_losses, value_losses, *weights)


@torch.no_grad()
def with_late_score(experience: Experience, value_model: nn.Module) -> Experience:
    """Return ``experience`` with advantages of a score, and with a value, one token after EOS."""
    tokens = experience.tokens
    rewards, values = experience.rewards.clone(), experience.values.clone()
    ends = tokens.response_lengths.clamp_max(NEW - 1)
    for row, ids in enumerate(tokens.sequences()):
        end, last = int(ends[row]), int(tokens.response_lengths[row]) - 1
        rewards[row, last] -= experience.scores[row]
        rewards[row, end] += experience.scores[row]
        if end > last:
            values[row, end] = value_model(ids[None])[0, -1]
    mask = torch.arange(NEW) <= ends[:, None]
    advantages, returns = gae(rewards, values, mask=mask, gamma=GAMMA, lam=LAMBDA)
    mask = tokens.response_mask
    return replace(
        experience,
        advantages=whiten(advantages.masked_fill(~mask, 0.0), mask=mask),
        returns=returns.masked_fill(~mask, 0.0),
    )


def loss_gap(theirs: list[float], ours: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(theirs, ours, strict=True))


def weight_gap(
    start: dict[str, Tensor], theirs: dict[str, Tensor], ours: dict[str, Tensor]
) -> float:
    """Return the largest difference, as a part of the largest change."""
    change = max(float((theirs[name] - start[name]).abs().max()) for name in start)
    return max(float((theirs[name] - ours[name]).abs().max()) for name in start) / change


def compare(models: Models, theirs: Run, ours: Run) -> dict[str, float]:
    """Print every loss and the largest gaps; return the gaps."""
    rows = zip(
        theirs.policy_losses, ours.policy_losses, theirs.value_losses, ours.value_losses,
        strict=True,
    )  # fmt: skip
    print("  step   policy loss: TRL, ours       value loss: TRL, ours")
    for step, losses in enumerate(rows, 1):
        print(f"  {step:4}" + "".join(f" {loss:13.7f}" for loss in losses))
    gaps = {
        "policy loss": loss_gap(theirs.policy_losses, ours.policy_losses),
        "value loss": loss_gap(theirs.value_losses, ours.value_losses),
        "policy weights": weight_gap(models.policy.state_dict(), theirs.policy, ours.policy),
        "value weights": weight_gap(models.values.state_dict(), theirs.values, ours.values),
    }
    print("  largest gaps: " + ", ".join(f"{what} {gap:.1e}" for what, gap in gaps.items()))
    return gaps


def agree(gaps: dict[str, float], *whats: str) -> bool:
    return all(
        gaps[what] <= (LOSS_TOLERANCE if what.endswith("loss") else WEIGHT_TOLERANCE)
        for what in whats
    )


def main() -> None:
    models, prompts = make_models(), make_prompts()
    full, early = make_responses([NEW] * ROWS), make_responses([12, 5, 3, 12, 8, 1, 11, 12])
    everything = ("policy loss", "value loss", "policy weights", "value weights")
    of_policy = ("policy loss", "policy weights")

    for epochs, minibatches in ((1, 1), (4, 1), (4, 2)):
        print(f"full responses, {epochs} epochs of {minibatches} minibatches")
        theirs, order = by_trl(models, prompts, full, epochs, minibatches)
        rows = [prompts[i] for i in order], [full[i] for i in order]
        gaps = compare(models, theirs, by_ours(models, *rows, epochs, minibatches))
        assert agree(gaps, *everything), "TRL and ours differ where they should not"

    theirs, order = by_trl(models, prompts, early, 4, 1)
    rows = [prompts[i] for i in order], [early[i] for i in order]
    print("EOS ends responses, 4 epochs: TRL puts the score a token after it")
    gaps = compare(models, theirs, by_ours(models, *rows, 4, 1))
    assert not agree(gaps, *of_policy), "TRL no longer puts the score a token late: say so here"
    print("the same, our advantages from a score put there: the policy agrees, the values' loss")
    print("lacks TRL's token after EOS")
    gaps = compare(models, theirs, by_ours(models, *rows, 4, 1, late=True))
    assert agree(gaps, *of_policy), "TRL and ours differ by more than the place of the score"
    print("parity: as expected")


if __name__ == "__main__":
    main()
