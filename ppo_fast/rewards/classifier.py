"""A sequence classifier with a tokenizer of its own, as a reward function."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.rewards.score import check_reward_model


class ClassifierReward:
    """A sequence classifier with a tokenizer of its own, as a reward function.

    The texts are tokenised for the classifier, so it need not share the policy's vocabulary.

    Args:
        model: ``AutoModelForSequenceClassification`` with one label.
        tokenizer: the classifier's tokenizer.
        batch_size: number of texts in one call.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32
    ) -> None:
        check_reward_model(model)
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size

    @torch.no_grad()
    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        texts = [p + c for p, c in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                texts[start : start + self.batch_size],
                padding=True,
                padding_side="right",
                truncation=True,
                return_tensors="pt",
            ).to(self.model.device)
            scores += self.model(**batch).logits.float().flatten().tolist()
        return scores
