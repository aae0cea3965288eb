"""Whole PPO steps by TRL's PPOTrainer, on the CPU, to compare ours with.

A call of its `train()` is one update here: the trainer is made before, and what `train()` does
before and after its loop takes milliseconds. The reward costs nothing: TRL wants a reward model
with a body that returns hidden states and a `score` of them; that of `SumOfIds` adds up the ids.
"""

from __future__ import annotations

import copy
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PrinterCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


class SumOfIds(nn.Module):
    """A reward model without weights: the sum of a sequence's ids, modulo 97 and divided by 50."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Identity()

    def body(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[input_ids.cumsum(1)[..., None] % 97 / 50])


def value_model_of(policy: Any) -> Any:
    """Return TRL's kind of value model: a one-label classifier on a copy of the policy's body."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    model.model = copy.deepcopy(policy.model)
    return model


def make_trainer(
    policy: Any,
    reference: Any,
    value_model: Any,
    tokenizer: Any,
    prompt_ids: list[list[int]],
    folder: str,
    *,
    bf16: bool = False,
    **options: Any,
) -> PPOTrainer:
    """Return a trainer whose `train()` is one update on all prompts."""
    config = PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=len(prompt_ids),
        total_episodes=len(prompt_ids),
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=bf16,
        use_cpu=True,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=SumOfIds(),
        train_dataset=Dataset.from_dict({"input_ids": prompt_ids}),
        value_model=value_model,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Theirs:
    """Steps of TRL's PPOTrainer, which trains all weights of policy and value model.

    Its pad token is the model's <|im_end|>: where it is sampled, a response ends in TRL's masks,
    but the step costs as much.
    """

    def __init__(
        self,
        smollm2: Any,
        prompts: list[str],
        max_length: int,
        epochs: int,
        *,
        bf16: bool = False,
    ) -> None:
        model, tokenizer = smollm2
        policy = copy.deepcopy(model)
        self._folder = tempfile.TemporaryDirectory()
        torch.manual_seed(0)
        self.trainer = make_trainer(
            policy,
            copy.deepcopy(policy),
            value_model_of(policy),
            tokenizer,
            tokenizer(prompts)["input_ids"],
            self._folder.name,
            learning_rate=1e-5,
            temperature=1.0,
            response_length=max_length,
            num_ppo_epochs=epochs,
            bf16=bf16,
        )

    def step(self) -> None:
        self.trainer.train()
