"""Similarity of a completion and a reference text, by a sentence encoder."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.checks import check_counts
from ppo_fast.models.checks import check_tokenizer
from ppo_fast.models.parts import base_of
from ppo_fast.rewards.columns import column as column_of
from ppo_fast.rewards.columns import signature_with
from ppo_fast.rewards.encoding import largest_length

logger = logging.getLogger(__name__)


class SimilarityReward:
    """Cosine of the embeddings of a completion and of a column's text, in [-1, 1].

    An embedding is the mean of the encoder's last hidden states over a text's tokens (Reimers and
    Gurevych 2019, section 3), as in most encoders of sentence-transformers, "all-MiniLM-L6-v2"
    among them. It is computed in the encoder's dtype and pooled in float32. Where the column has
    None, the response is not judged; a text without tokens has similarity 0 to all.

    Args:
        model: the encoder, of transformers' ``AutoModel``.
        tokenizer: the encoder's tokenizer.
        column: name of the column with the reference texts.
        batch_size: number of texts in one call of the encoder.
        max_length: max tokens of a text, of which the beginning is read; None: as many as model and
            tokenizer take.

    Raises:
        TypeError: ``tokenizer`` is none.
        ValueError: it has no pad token, or a number is out of range.
    """

    name = "similarity"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        column: str = "reference",
        *,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, expected a model of AutoModel")
        check_tokenizer(tokenizer)
        check_counts(batch_size=batch_size)
        if max_length is not None:
            check_counts(max_length=max_length)
        self.model: Any = model.eval()
        self._inputs = set(inspect.signature(type(base_of(model)).forward).parameters)
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.truncation_side = "right"  # the beginning is read
        self.column, self.batch_size = column, batch_size
        self.max_length = min(largest_length(model, tokenizer), max_length or 10**9)
        self.needs = (column,)
        self.__signature__ = signature_with(self.needs)
        self._warned = False

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        column: str = "reference",
        *,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> SimilarityReward:
        """Load encoder (in float32) and tokenizer from a directory, or by a name on the hub."""
        return cls(
            AutoModel.from_pretrained(model, dtype=torch.float32),
            AutoTokenizer.from_pretrained(model),
            column,
            batch_size=batch_size,
            max_length=max_length,
        )

    def to(self, device: torch.device | str) -> SimilarityReward:
        """Move the encoder to ``device``, as a trainer does with its models."""
        self.model.to(device)
        return self

    def __call__(
        self, prompts: list[str], completions: list[str], **columns: Any
    ) -> list[float | None]:
        """Return a similarity for each completion; None where the column has None."""
        references = column_of(columns, self.column, "SimilarityReward")
        pairs = list(zip(completions, references, strict=True))
        texts = [str(text) for pair in pairs if pair[1] is not None for text in pair]
        index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        if not index:
            return [None] * len(pairs)
        found = self.embed(list(index))

        def cosine(a: str, b: str) -> float:
            return float((found[index[a]] @ found[index[b]]).clamp(-1, 1))  # rounding goes beyond

        return [None if b is None else cosine(str(a), str(b)) for a, b in pairs]

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """Return the embeddings of texts, [n, D] float32 on the CPU, each of length 1 (or 0)."""
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        self._warn(lengths)
        order = sorted(range(len(texts)), key=lambda i: -lengths[i])  # little padding
        embeddings: list[Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for i, embedding in zip(rows, self._embed(encoded, rows), strict=True):
                embeddings[i] = embedding
        return torch.stack(embeddings)

    def _embed(self, encoded: Any, rows: list[int]) -> Tensor:
        chosen = {name: [values[i] for i in rows] for name, values in encoded.items()}
        if not chosen["input_ids"][0]:  # the longest
            width = self.model.config.get_text_config().hidden_size
            return torch.zeros(len(rows), width, dtype=torch.float32, device="cpu")
        batch = self.tokenizer.pad(chosen, padding_side="right", return_tensors="pt")
        batch = batch.to(self.model.device)
        # tokenizers may give token_type_ids that the encoder has no place for
        inputs = {name: ids for name, ids in batch.items() if name in self._inputs}
        states = self.model(**inputs).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        # masked_fill: states of the padding may be anything
        sums = states.masked_fill(mask == 0, 0.0).sum(1)
        return nn.functional.normalize(sums, dim=-1).cpu()  # of sums, as of means

    def _warn(self, lengths: list[int]) -> None:
        if not self._warned and max(lengths) >= self.max_length:
            self._warned = True
            logger.warning(
                "SimilarityReward reads the first %d tokens of longer texts", self.max_length
            )
