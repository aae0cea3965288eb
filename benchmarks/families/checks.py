"""Checks of one family's tiny model: each number against the truth."""

from __future__ import annotations

import math
import re
import tempfile
import traceback
from collections.abc import Callable
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from families.configs import Case, tiny_model
from families.truth import in_float64, plain_logits, true_logprobs
from tiny_models import PAD_ID, VOCAB_SIZE, tiny_tokenizer
from tiny_trainer import changed, count_letters, weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import ppo_fast
from ppo_fast import PPOConfig, PPOTrainer
from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.models.lora import with_lora
from ppo_fast.models.parts import body_of, layer_list

# Of 1 to 14 tokens, and more of them than slots.
PROMPTS = [
    "A",
    "There",
    "The film was",
    "Nothing in this room",
    "She thought",
    "The train to the north is there",
]
MAX_LENGTH = 10
RESPONSE_LENGTHS = [10, 1, 7, 9, 4, 8, 5, 3]
# Of short cases, whose rows have at most 12 tokens.
SHORT_PROMPTS = ["A", "There", "The film was", "She thought", "Then"]
SHORT_MAX_LENGTH = 5
SETTINGS: dict[str, Any] = {
    "critic": "baseline",
    "learning_rate": 1e-3,
    "num_epochs": 2,
    "rollout_slots": 2,
}
TOLERANCE = 1e-3
TOLERANCE_BF16 = 0.3


class Result(NamedTuple):
    """Outcome of a check.

    outcome: "right", "wrong", "refused" (by an error of ours), "fails" (any other error) or "not
        run".
    text: the reason; of what is right, a remark.
    number: the largest difference, where one was taken.
    """

    outcome: str
    text: str = ""
    number: float | None = None


class Subject:
    """What the checks of a case share.

    Args:
        case: the case.

    Attributes:
        model: the model, never changed.
        trained: the trainer of ``check_step``, once that has run.
        prompts, max_length: what it is trained on.
    """

    def __init__(self, case: Case) -> None:
        self.model: PreTrainedModel = tiny_model(case)
        self.trained: PPOTrainer | None = None
        self.prompts = SHORT_PROMPTS if case.short else PROMPTS
        self.max_length = SHORT_MAX_LENGTH if case.short else MAX_LENGTH

    def trainer(self, policy: nn.Module | None = None, **options: Any) -> PPOTrainer:
        """Make a trainer of a copy of the model, or of ``policy``, for the prompts."""
        policy = deepcopy(self.model) if policy is None else policy
        config = PPOConfig(**(SETTINGS | {"max_length": self.max_length} | options))
        trainer = PPOTrainer(policy, None, count_letters, tiny_tokenizer(), "cpu", config=config)
        trainer.check_prompts(self.prompts)  # as ``train`` does before the first step
        return trainer

    @cached_property
    def tokens(self) -> Tokens:
        """Prompts with responses of random tokens; the last two share one with others."""
        generator = torch.Generator().manual_seed(0)
        prompts = tiny_tokenizer()([*self.prompts, *self.prompts[1:3]])["input_ids"]
        lengths = [min(n, self.max_length) for n in RESPONSE_LENGTHS[: len(prompts)]]
        responses = [
            torch.randint(2, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths
        ]
        return make_tokens(prompts, responses, PAD_ID, torch.device("cpu"))


def compare_logprobs(found: Tensor | None, model: nn.Module, tokens: Tokens) -> Result:
    """Compare log-probs with the truth."""
    if found is None:
        return Result("fails", "the rollout has no log-probs")
    with torch.no_grad():
        expected = true_logprobs(in_float64(model), tokens)
    difference = (found - expected)[tokens.response_mask].abs().max().item()
    return judge(difference, TOLERANCE, "log-probs differ from the truth")


def judge(number: float, tolerance: float, what: str) -> Result:
    """Return "right" below the tolerance; NaN is wrong."""
    right = number < tolerance
    return Result("right", "", number) if right else Result("wrong", what, number)


def is_refusal(error: Exception) -> bool:
    """Return whether the error is one that this package raises in words of its own."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    package = Path(ppo_fast.__file__).parent
    ours = Path(frame.filename).is_relative_to(package)
    says = (frame.line or "").startswith("raise") or re.match(r"[\w.]+: ", str(error))
    return isinstance(error, (ValueError, TypeError)) and ours and bool(says)


# The checks


def check_rollout(subject: Subject) -> Result:
    """Compare the log-probs that decoding recorded."""
    trainer = subject.trainer()
    rollout = trainer.rollout(subject.prompts)
    return compare_logprobs(rollout.logprobs, subject.model, rollout.tokens)


def check_logprobs(subject: Subject) -> Result:
    """Compare the log-probs of a batch."""
    policy, tokens = subject.trainer().policy, subject.tokens
    with torch.no_grad():
        found = policy.logprobs(policy.forward(tokens), tokens, temperature=1.0).logprobs
    return compare_logprobs(found, subject.model, tokens)


def check_gradients(subject: Subject) -> Result:
    """Compare each weight's gradient of a weighted sum of log-probs."""
    policy, tokens = subject.trainer().policy, subject.tokens
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(tokens.response_ids.shape, generator=generator) * tokens.response_mask
    found = policy.logprobs(policy.forward(tokens), tokens, temperature=1.0).logprobs
    (found * weight).sum().backward()
    exact = in_float64(subject.model)
    (true_logprobs(exact, tokens) * weight).sum().backward()
    ours, true = gradients(policy.model), gradients(exact)
    norm = torch.stack([gradient.norm() for gradient in true.values()]).norm()
    differences = {
        # that of a weight which hardly matters is rounding of the others
        name: ((ours[name] - true[name]).norm() / (true[name].norm() + 1e-3 * norm)).item()
        for name in true
    }
    worst = max(differences, key=lambda name: (math.isnan(differences[name]), differences[name]))
    return judge(differences[worst], TOLERANCE, f"the gradient of {worst} differs")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients in float64 by name; zeros where there is none."""
    return {
        name: torch.zeros_like(p, dtype=torch.float64) if p.grad is None else p.grad.double()
        for name, p in model.named_parameters()
    }


def check_step(subject: Subject) -> Result:
    """Run a step with a value head; without one, and the reason, where that is refused."""
    note = ""
    try:
        trainer = subject.trainer(critic="head")
    except (ValueError, TypeError) as error:
        if not is_refusal(error):
            raise
        note = str(error)
        trainer = subject.trainer()
    result = step(trainer, subject.prompts)
    if result.outcome == "right":
        subject.trained = trainer
        return result._replace(text=note)
    return result


def step(trainer: PPOTrainer, prompts: list[str], tolerance: float = TOLERANCE) -> Result:
    """Run a step, after which some weights have to differ."""
    policy = trainer.policy.model
    before = weights(policy)
    try:
        metrics = trainer.train_step(prompts)
    except (ValueError, TypeError) as error:
        if is_refusal(error) and changed(policy, before):
            return Result("fails", f"after training began: {error}")
        raise
    if not changed(policy, before):
        return Result("wrong", "a step changes no weight")
    what = "the ratios of the first minibatch are not 1"
    return judge(metrics["first_max_log_ratio"], tolerance, what)


def check_trunk(subject: Subject) -> Result:
    """Run a step that trains the top layer, and compare a rollout after it."""
    trainer = subject.trainer(num_layers_unfrozen=1)
    policy = trainer.policy.model
    *trunk, top = layer_list(body_of(policy))
    below = [weights(module) for module in [*trunk, policy.get_input_embeddings()]]
    above = weights(top)
    result = step(trainer, subject.prompts)
    if result.outcome != "right":
        return result
    modules = [*trunk, policy.get_input_embeddings()]
    if names := set().union(*map(changed, modules, below)):
        return Result("wrong", f"a step changes the trunk: {', '.join(sorted(names)[:3])}")
    if not changed(top, above):
        return Result("wrong", "a step changes nothing in the top layer")
    return rollout_after(trainer, subject.prompts, result)


def check_lora(subject: Subject) -> Result:
    """Run a step that trains adapters, and compare a rollout after it."""
    policy = with_lora(deepcopy(subject.model), 4)
    trainer = subject.trainer(policy)
    before = weights(policy)
    result = step(trainer, subject.prompts)
    if others := {name for name in changed(policy, before) if "lora_" not in name}:
        return Result("wrong", f"a step changes {', '.join(sorted(others)[:3])}")
    if result.outcome != "right":
        return result
    return rollout_after(trainer, subject.prompts, result)


def rollout_after(trainer: PPOTrainer, prompts: list[str], before: Result) -> Result:
    """Compare a rollout after a step with the truth; return that or the step's, if worse."""
    rollout = trainer.rollout(prompts)
    after = compare_logprobs(rollout.logprobs, trainer.policy.model, rollout.tokens)
    return max(before, after, key=lambda result: (result.outcome == "wrong", result.number))


def check_bf16(subject: Subject) -> Result:
    """Run a step that computes in bfloat16."""
    trainer = subject.trainer(compute_dtype="bfloat16")
    return step(trainer, subject.prompts, TOLERANCE_BF16)


def check_save(subject: Subject) -> Result:
    """Load the trained policy in transformers, and a checkpoint in a new trainer."""
    trainer = subject.trained
    if trainer is None:
        return Result("not run", "there is no trained policy to save")
    with tempfile.TemporaryDirectory() as folder:
        policy = trainer.policy.model
        policy.save_pretrained(folder)
        loaded, note = load(folder, type(policy))
        with torch.no_grad():
            rows = subject.tokens.sequences()
            here, there = (
                torch.cat([plain_logits(model, ids) for ids in rows])
                for model in (policy.eval(), loaded)
            )
        difference = ((here - there).abs().max() / here.abs().max()).item()
        if not difference < 1e-5:
            return Result("wrong", "logits of the saved policy differ", difference)
        path = trainer.save_checkpoint(folder, 1)
        other = subject.trainer(critic=trainer.config.critic)
        other.load_checkpoint(path)
        if names := changed(other.policy.model, weights(policy)):
            return Result("wrong", f"a checkpoint does not restore {', '.join(sorted(names)[:3])}")
        if trainer.critic.trained and changed(other.critic.module, weights(trainer.critic.module)):
            return Result("wrong", "a checkpoint does not restore the value head")
    return Result("right", note)


def load(folder: str, model_class: type[PreTrainedModel]) -> tuple[PreTrainedModel, str]:
    """Load a saved policy; return it and a remark."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), ""
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
    note = "AutoModelForCausalLM does not load the saved policy, but its own class does"
    return model_class.from_pretrained(folder, dtype=torch.float32).eval(), note


CHECKS: dict[str, Callable[[Subject], Result]] = {
    "rollout": check_rollout,
    "log-probs": check_logprobs,
    "gradients": check_gradients,
    "step": check_step,
    "trunk": check_trunk,
    "LoRA": check_lora,
    "bf16": check_bf16,
    "save": check_save,
}
