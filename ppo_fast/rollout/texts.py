"""Texts: prompts become token ids that the models can take, and sampled ids become texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.data.prompts import Prompt, check_prompt_ids, check_prompts, encode_prompts
from ppo_fast.data.rollout import Rollout, sampled_ids
from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.models.checks import context_limit
from ppo_fast.models.parts import num_embeddings
from ppo_fast.rollout.engine import eos_ids
from ppo_fast.rollout.turns import Environment, Turns


class Texts:
    """Turns prompts into ids, and sampled ids into texts for reward functions and for reading.

    Args:
        policy_model: the model that samples.
        tokenizer: its tokenizer.
        skip_special_tokens: whether to leave all special tokens out of texts. If not, only the EOS
            token at a response's end is left out.
    """

    def __init__(
        self,
        policy_model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        skip_special_tokens: bool,
    ) -> None:
        self.policy_model, self.tokenizer = policy_model, tokenizer
        self.skip_special_tokens = skip_special_tokens

    def encode(
        self, prompts: Sequence[Prompt], max_length: int, others: Mapping[str, Any] | None = None
    ) -> list[list[int]]:
        """Return the ids of prompts, checked to leave room for ``max_length`` response tokens.

        Args:
            prompts: texts, or lists of ids, which stay as they are.
            max_length: max response tokens.
            others: other models, by name, that will read the sequences.

        Raises:
            ValueError: a prompt is empty, too long, or holds an id outside the vocabulary.
        """
        ids = encode_prompts(self.tokenizer, prompts)
        limit = context_limit({"policy_model": self.policy_model, **(others or {})})
        vocab_size = num_embeddings(self.policy_model)
        check_prompt_ids(prompts, ids, max_length, limit, vocab_size=vocab_size)
        return ids

    def pairs(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        last_rollout: Rollout | None,
        device: torch.device,
    ) -> Tokens:
        """Return the tokens of pairs of texts: as ``last_rollout`` has them, else encoded.

        Raises:
            ValueError: their numbers differ, or a response is empty.
        """
        check_prompts(prompts)
        if len(prompts) != len(responses):
            raise ValueError(
                f"responses: got {len(responses)}, expected {len(prompts)}, one a prompt"
            )
        sampled = sampled_ids(last_rollout)
        prompt_ids, response_ids = [], []
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if rows := sampled.get((prompt, response)):
                # the same pair may have been sampled twice, from different tokens
                pair = rows.pop(0) if len(rows) > 1 else rows[0]
            else:
                encoded = self.tokenizer(response, add_special_tokens=False)["input_ids"]
                pair = (self.encode([prompt], 0)[0], encoded)
            if not pair[1]:
                raise ValueError(
                    f"responses[{i}]: {response!r} is empty after tokenisation; a response has at "
                    "least one token"
                )
            prompt_ids.append(pair[0])
            response_ids.append(pair[1])
        return make_tokens(prompt_ids, response_ids, self.tokenizer.pad_token_id, device)

    def turns(self, environments: Sequence[Environment]) -> Turns:
        """Return the turns of a rollout's sequences, with an environment each."""
        ends = eos_ids(self.policy_model, self.tokenizer)
        return Turns(
            environments,
            encode=lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"],
            to_text=lambda ids: self._decode([ids[:-1] if ids[-1] in ends else ids])[0],
            vocab_size=num_embeddings(self.policy_model),
        )

    def check(self, tokens: Tokens, device: torch.device) -> None:
        """Check tokens that were sampled elsewhere.

        Raises:
            ValueError: they are on another device, or an id is outside the vocabulary.
        """
        if tokens.device != device:
            raise ValueError(
                f"rollout: its tokens are on {tokens.device}, the trainer's models on {device}; "
                f"use Rollout.from_tokens(..., device={str(device)!r})"
            )
        vocab_size, ids = num_embeddings(self.policy_model), tokens.input_ids
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(
                f"rollout: holds ids from {int(ids.min())} to {int(ids.max())}, expected 0 to "
                f"{vocab_size - 1}, the policy's vocabulary"
            )

    def decode(self, rollout: Rollout, prompts: Sequence[Prompt] = ()) -> Rollout:
        """Return ``rollout`` with the texts of its prompts and responses.

        ``prompts`` are its prompts as they were given: a text stays as it is. Empty: all are
        decoded.
        """
        prompt_rows, rows = _rows(rollout.tokens)
        ends = eos_ids(self.policy_model, self.tokenizer)
        rows = [ids[:-1] if ids and ids[-1] in ends else ids for ids in rows]
        texts = self._decode(prompt_rows)
        given = [p if isinstance(p, str) else t for p, t in zip(prompts, texts, strict=False)]
        completions = self._continuations(prompt_rows, rows, texts)
        return replace(rollout, prompts=given or texts, completions=completions)

    def _continuations(
        self, prompts: list[list[int]], responses: list[list[int]], prompt_texts: list[str]
    ) -> list[str]:
        """Return the text of each response, as it continues its prompt.

        It is what prompt and response give when decoded together, after what the prompt gives
        alone: decoded alone, the first word of a response lacks the space before it with many
        tokenizers. If that text does not begin with the prompt's, the response is decoded alone.
        """
        both = self._decode([p + r for p, r in zip(prompts, responses, strict=True)])
        return [
            whole[len(prompt) :] if whole.startswith(prompt) else self._decode([row])[0]
            for prompt, whole, row in zip(prompt_texts, both, responses, strict=True)
        ]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        skip = self.skip_special_tokens
        return self.tokenizer.batch_decode(rows, skip_special_tokens=skip)


def _rows(tokens: Tokens) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ids of each prompt and of each response."""
    lengths = tokens.prompt_lengths.tolist()
    rows = [ids.tolist() for ids in tokens.sequences()]
    pairs = list(zip(rows, lengths, strict=True))
    return [ids[:n] for ids, n in pairs], [ids[n:] for ids, n in pairs]
