"""Texts: prompts become token ids that the models can take, and sampled ids become texts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.data.ended import Ended, OnEnd
from ppo_fast.data.examples import Example, as_examples, key_of
from ppo_fast.data.prompts import (
    Limit,
    PromptTokens,
    check_prompt_ids,
    cut_left,
    encode_prompts,
)
from ppo_fast.data.rollout import Rollout, Sampled, sampled_pairs
from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.models.checks import context_limit
from ppo_fast.models.parts import num_embeddings
from ppo_fast.rollout.engine import OnIds, eos_ids
from ppo_fast.rollout.turns import Environment, Turns

logger = logging.getLogger(__name__)

LongPrompts = Literal["refuse", "cut", "drop"]


class Pairs(NamedTuple):
    """Prompts and responses as tokens.

    prompts: the prompts' texts, as the policy reads them.
    sampled: whether all are pairs of the last rollout.
    """

    tokens: Tokens
    prompts: list[str]
    sampled: bool


class Texts:
    """Turns prompts into ids, and sampled ids into texts for reward functions and for reading.

    Args:
        policy_model: the model that samples.
        tokenizer: its tokenizer.
        skip_special_tokens: whether to leave all special tokens out of texts. If not, only the EOS
            token at a response's end is left out.
        long_prompts: what to do with prompts that are too long: "refuse", "cut" or "drop".
        max_prompt_length: max tokens of a prompt; None: what the models' contexts leave.
    """

    def __init__(
        self,
        policy_model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        skip_special_tokens: bool,
        long_prompts: LongPrompts = "refuse",
        max_prompt_length: int | None = None,
    ) -> None:
        self.policy_model, self.tokenizer = policy_model, tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.long_prompts, self.max_prompt_length = long_prompts, max_prompt_length
        self._said_cut = False

    def encode(
        self,
        prompts: Iterable[Any],
        max_length: int,
        others: Mapping[str, Any] | None = None,
        *,
        cut_for: Mapping[str, Any] | None = None,
    ) -> list[PromptTokens]:
        """Return the tokens of prompts, checked to leave room for ``max_length`` response tokens.

        With ``long_prompts="cut"``, the beginning of longer ones is cut.

        Args:
            prompts: texts, lists of ids, chats, rows or Examples.
            max_length: max response tokens.
            others: other models, by name, that will read the sequences.
            cut_for: others for whose contexts longer prompts are cut, but not refused.

        Raises:
            ValueError: a prompt is empty, too long, or holds an id outside the vocabulary.
        """
        found = encode_prompts(self.tokenizer, prompts)
        least = self._limit(max_length, {**(others or {}), **(cut_for or {})})
        if self.long_prompts == "cut" and least is not None:
            found = self._cut(found, least.tokens - max_length)
        limit, vocab_size = self._limit(max_length, others), num_embeddings(self.policy_model)
        mend = {
            "refuse": ", or set long_prompts to 'cut' or 'drop'",
            "cut": "",
            "drop": "; train() drops it",
        }[self.long_prompts]
        check_prompt_ids(found, max_length, limit, vocab_size=vocab_size, mend=mend)
        return found

    def fitting(
        self, prompts: Sequence[Example], max_length: int, others: Mapping[str, Any] | None = None
    ) -> list[Example]:
        """Return the prompts without those to be dropped, after a check of all as in ``encode``.

        With ``long_prompts="drop"``, those that are too long are dropped.
        """
        limit = self._limit(max_length, others)
        if self.long_prompts != "drop" or limit is None:
            self.encode(prompts, max_length, others)
            return list(prompts)
        room, found = limit.tokens - max_length, encode_prompts(self.tokenizer, prompts)
        check_prompt_ids(found, 0, None, vocab_size=num_embeddings(self.policy_model))
        return [e for e, f in zip(prompts, found, strict=True) if len(f.ids) <= room]

    def _limit(self, max_length: int, others: Mapping[str, Any] | None) -> Limit | None:
        """Return the limit of a sequence with ``max_length`` response tokens."""
        limit = context_limit({"policy_model": self.policy_model, **(others or {})})
        longest = self.max_prompt_length
        if longest is None or (limit is not None and limit.tokens <= longest + max_length):
            return limit
        return Limit(longest + max_length, f"max_prompt_length={longest}")

    def _cut(self, prompts: list[PromptTokens], room: int) -> list[PromptTokens]:
        bos = self.tokenizer.bos_token_id
        cut = [PromptTokens(cut_left(p.ids, room, bos), p.text) for p in prompts]
        count = sum(len(c.ids) < len(p.ids) for c, p in zip(cut, prompts, strict=True))
        if count and not self._said_cut:
            self._said_cut = True
            logger.warning(
                "long_prompts='cut': %d of %d prompts lose their beginning, beyond %d tokens (said "
                "once)",
                count,
                len(prompts),
                room,
            )
        # rewards see the text that the policy read
        return [
            c if len(c.ids) == len(p.ids) else PromptTokens(c.ids, None)
            for c, p in zip(cut, prompts, strict=True)
        ]

    def pairs(
        self,
        prompts: Sequence[Any],
        responses: Sequence[str],
        last_rollout: Rollout | None,
        device: torch.device,
    ) -> Pairs:
        """Return the tokens of prompts and texts: as ``last_rollout`` has them, else encoded.

        Raises:
            ValueError: their numbers differ, or a response is empty.
        """
        examples = as_examples(prompts)
        if len(examples) != len(responses):
            raise ValueError(
                f"responses: got {len(responses)}, expected {len(examples)}, one a prompt"
            )
        sampled = sampled_pairs(last_rollout)
        found: list[Sampled] = []
        known = True
        for i, (example, response) in enumerate(zip(examples, responses, strict=True)):
            if rows := sampled.get((key_of(example.prompt), response)):
                # the same pair may have been sampled twice, from different tokens
                found.append(rows.pop(0) if len(rows) > 1 else rows[0])
                continue
            known = False
            (prompt,) = self.encode([example], 0)
            ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
            if not ids:
                raise ValueError(
                    f"responses[{i}]: {response!r} is empty after tokenisation; a response has at "
                    "least one token"
                )
            text = self._decode([prompt.ids])[0] if prompt.text is None else prompt.text
            found.append(Sampled(prompt.ids, ids, text))
        tokens = make_tokens(
            [pair.prompt_ids for pair in found],
            [pair.response_ids for pair in found],
            self.tokenizer.pad_token_id,
            device,
        )
        return Pairs(tokens, [pair.text for pair in found], known)

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

    def decode(self, rollout: Rollout, prompts: Sequence[str | None] = ()) -> Rollout:
        """Return ``rollout`` with the texts of its prompts and responses.

        ``prompts`` are the texts that its prompts were tokenised from; None, or none at all: they
        are decoded.
        """
        texts, completions = self._read(*_rows(rollout.tokens))
        given = [t if p is None else p for p, t in zip(prompts, texts, strict=False)]
        return replace(rollout, prompts=given or texts, completions=completions)

    def as_they_end(self, prompts: Sequence[PromptTokens], on_end: OnEnd) -> OnIds:
        """Return what an engine calls with ids, for ``on_end`` with the texts of ``decode``.

        ``prompts`` are those of the rollout's rows.
        """

        def ended(row: int, ids: list[int]) -> None:
            prompt = prompts[row]
            (text,), (completion,) = self._read([prompt.ids], [ids])
            on_end(Ended(row, text if prompt.text is None else prompt.text, completion, ids))

        return ended

    def _read(
        self, prompt_rows: list[list[int]], rows: list[list[int]]
    ) -> tuple[list[str], list[str]]:
        """Return the texts of prompts and of responses."""
        ends = eos_ids(self.policy_model, self.tokenizer)
        rows = [ids[:-1] if ids and ids[-1] in ends else ids for ids in rows]
        texts = self._decode(prompt_rows)
        return texts, self._continuations(prompt_rows, rows, texts)

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
