"""A sequence classifier with a tokenizer of its own, as a reward function."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from ppo_fast.models.checks import context_limit
from ppo_fast.rewards.score import check_reward_model

logger = logging.getLogger(__name__)


class ClassifierReward:
    """A sequence classifier with a tokenizer of its own, as a reward function.

    The texts, prompt and completion joined, are tokenised for the classifier, so it need not share
    the policy's vocabulary. Of a text longer than the classifier takes, the beginning is cut: the
    completion is what is judged.

    Args:
        model: ``AutoModelForSequenceClassification``.
        tokenizer: the classifier's tokenizer.
        label: name or index of the label whose log-odds are the score, log p / (1 - p) with p its
            probability among all. None: the model has one label, whose logit is the score.
        batch_size: number of texts in one call.

    Raises:
        ValueError: the model has several labels and ``label`` is None or none of them, or the
            tokenizer has no pad token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label: str | int | None = None,
        batch_size: int = 32,
    ) -> None:
        self.label = _index_of(label, model.config)
        check_reward_model(model, labels=model.config.num_labels)
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "reward: the classifier's tokenizer has no pad token; set one, for example "
                "tokenizer.pad_token = tokenizer.eos_token"
            )
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        limit = context_limit({"reward": model})
        # positions of RoBERTa's kind begin after the pad id
        table = getattr(model.base_model, "embeddings", None)
        padding = getattr(getattr(table, "position_embeddings", None), "padding_idx", None)
        taken = 0 if padding is None else padding + 1
        self.max_length = min(tokenizer.model_max_length, limit.tokens - taken if limit else 10**9)
        self._warned = False

    def to(self, device: torch.device | str) -> ClassifierReward:
        """Move the classifier to ``device``, as a trainer does with its models."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        texts = [p + c for p, c in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = self._encode(texts[start : start + self.batch_size]).to(self.model.device)
            logits = self.model(**batch).logits.float()
            if self.label is not None:
                logits = self._log_odds(logits)
            scores += logits.flatten().tolist()
        return scores

    def _log_odds(self, logits: Tensor) -> Tensor:
        """Return the log-odds [n] of the label."""
        if self.model.config.problem_type == "multi_label_classification":
            return logits[:, self.label]  # each label has a sigmoid of its own
        others = [i for i in range(logits.shape[1]) if i != self.label]
        return logits[:, self.label] - logits[:, others].logsumexp(-1)

    def _encode(self, texts: list[str]) -> BatchEncoding:
        """Tokenise texts, without the beginning of those that are too long, and pad them."""
        # a text from a chat template may begin with the BOS token that the tokenizer adds
        bos = self.tokenizer.bos_token
        if bos and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]:
            texts = [text.removeprefix(bos) for text in texts]
        side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, "left"
        try:
            batch = self.tokenizer(
                texts,
                padding=True,
                padding_side="right",
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
        finally:
            self.tokenizer.truncation_side = side
        if not self._warned and batch["input_ids"].shape[1] == self.max_length:
            self._warned = True
            logger.warning(
                "ClassifierReward scores the last %d tokens of longer texts: its model takes no "
                "more",
                self.max_length,
            )
        return batch


def _index_of(label: str | int | None, config: PreTrainedConfig) -> int | None:
    """Return the index of a label; None where a model's only label is meant."""
    names = {index: str(name) for index, name in config.id2label.items()}
    if label is None:
        if config.num_labels == 1:
            return None
        raise ValueError(
            f"reward: the classifier has the labels {', '.join(names.values())}; say which one "
            f"counts: label={names[config.num_labels - 1]!r} (--reward-label)"
        )
    for index, name in names.items():
        if label == index or str(label).lower() == name.lower():
            return None if config.num_labels == 1 else index
    raise ValueError(f"label: got {label!r}, expected one of {', '.join(names.values())}")
