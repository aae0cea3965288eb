"""A sequence classifier with a tokenizer of its own, as a reward function."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from ppo_fast.checks import check_counts
from ppo_fast.rewards.encoding import (
    FORMAT_ATTRIBUTE,
    LENGTH_ATTRIBUTE,
    Chat,
    Encoder,
    Format,
    TooLong,
)
from ppo_fast.rewards.score import check_reward_model

logger = logging.getLogger(__name__)


class ClassifierReward:
    """A sequence classifier with a tokenizer of its own, as a reward function.

    The texts are tokenised for the classifier, so it need not share the policy's vocabulary. Of a
    text longer than the classifier takes, the beginning of the prompt is cut, and never the
    completion, which is what is judged.

    Args:
        model: ``AutoModelForSequenceClassification``.
        tokenizer: the classifier's tokenizer.
        label: name or index of the label whose log-odds are the score, log p / (1 - p) with p its
            probability among all. None: the model has one label, whose logit is the score.
        batch_size: number of texts in one call.
        format: "joined": prompt and completion in one text; "pair": the tokenizer's two segments,
            with token_type_ids where the model has them; "chat": the chat template of
            ``tokenizer`` over the messages; "policy": the prompt's tokens, the completion's and
            EOS, one after another. None: what the model was trained with, as
            ``train_reward_model`` notes in its config (``reward_format``), else "joined".
        cut_completions: of a completion that does not fit, judge its end.

    Raises:
        ValueError: the model has several labels and ``label`` is None or none of them, or the
            tokenizer has no pad token, or no chat template for ``format="chat"``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label: str | int | None = None,
        batch_size: int = 32,
        format: Format | None = None,
        cut_completions: bool = False,
    ) -> None:
        check_counts(batch_size=batch_size)
        if not hasattr(getattr(model, "config", None), "id2label"):
            raise TypeError(
                f"reward: got {type(model).__name__}, expected a sequence classifier of "
                "transformers; a ppo_fast.RewardModel is a reward itself: PPO(..., reward=model)"
            )
        self.label = _index_of(label, model.config)
        check_reward_model(model, labels=model.config.num_labels)
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "reward: the classifier's tokenizer has no pad token; set one, for example "
                "tokenizer.pad_token = tokenizer.eos_token"
            )
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self._encoder = Encoder(
            model,
            tokenizer,
            format or getattr(model.config, FORMAT_ATTRIBUTE, None) or "joined",
            max_length=getattr(model.config, LENGTH_ATTRIBUTE, None),
            cut_completions=cut_completions,
        )
        self.format, self.max_length = self._encoder.format, self._encoder.max_length
        self._warned = False

    def to(self, device: torch.device | str) -> ClassifierReward:
        """Move the classifier to ``device``, as a trainer does with its models."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        messages: list[Chat] | None = None,
    ) -> list[float]:
        """Return a score for each completion; ``messages``, whole chats, are for "chat" alone.

        Raises:
            ValueError: a completion alone is longer than the classifier takes, or a format "chat"
                has no messages.
        """
        try:
            rows, cut = self._encoder.encode(prompts, completions, messages)
        except TooLong as error:
            raise ValueError(
                f"completions[{error.index}]: has {error.tokens} tokens for the classifier, which "
                f"takes {error.room} beside special ones (max_length {self.max_length}); lower "
                "the policy's max_length, or pass cut_completions=True to judge the end"
            ) from error
        self._warn(cut, len(rows))
        # long rows first: a batch is as wide as its longest row
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
        scores = torch.empty(len(rows), dtype=torch.float32, device="cpu")
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self._encoder.pad([rows[i] for i in chosen], self.model.device)
            logits = self.model(**batch).logits.float()
            if self.label is not None:
                logits = self._log_odds(logits)
            scores[chosen] = logits.flatten().cpu()
        return scores.tolist()

    def _log_odds(self, logits: Tensor) -> Tensor:
        """Return the log-odds [n] of the label."""
        if self.model.config.problem_type == "multi_label_classification":
            return logits[:, self.label]  # each label has a sigmoid of its own
        others = [i for i in range(logits.shape[1]) if i != self.label]
        return logits[:, self.label] - logits[:, others].logsumexp(-1)

    def _warn(self, cut: int, count: int) -> None:
        if cut and not self._warned:
            self._warned = True
            logger.warning(
                "ClassifierReward scores the last %d tokens of longer texts, the beginning of the "
                "prompt is cut (%d of %d texts here): its model takes no more",
                self.max_length,
                cut,
                count,
            )


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
