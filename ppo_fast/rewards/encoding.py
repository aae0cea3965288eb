"""Tokens of prompts and completions as a reward model reads them, in training and in scoring."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.data.prompts import encode_prompts
from ppo_fast.models.checks import check_tokenizer, context_limit
from ppo_fast.rewards.questions import as_data, special_tokens, without

Format = Literal["joined", "pair", "chat", "policy"]
FORMATS = get_args(Format)
Chat = Sequence[dict[str, Any]]
# A text's tokens, and what a model reads beside them (attention_mask, token_type_ids): a name each.
Row = dict[str, list[int]]
# Attributes of a model's config in which training notes how the model was given its texts.
FORMAT_ATTRIBUTE, LENGTH_ATTRIBUTE = "reward_format", "reward_max_length"


class TooLong(ValueError):
    """A completion that does not fit, even without its prompt.

    Args:
        index: its index among those that were encoded.
        tokens: its tokens.
        room: the tokens that fit, beside special ones.
    """

    def __init__(self, index: int, tokens: int, room: int) -> None:
        super().__init__(f"completion {index} has {tokens} tokens, {room} fit")
        self.index, self.tokens, self.room = index, tokens, room


class Encoder:
    """Tokenises prompts and completions for a reward model.

    Of a text that is too long, the beginning of the prompt is cut; BOS, CLS and separators stay.
    Special tokens in completions become spaces, so that none ends a text or begins another turn;
    not in "policy", whose tokens a policy may have sampled.

    Args:
        model: the reward model; its forward says which inputs it takes, its config how it pads.
        tokenizer: the reward model's tokenizer.
        format: "joined": prompt and completion in one text. "pair": the tokenizer's two segments,
            with token_type_ids where the model has them. "chat": the tokenizer's chat template
            over whole chats. "policy": the prompt's tokens, the completion's and EOS, as a policy
            of the same tokenizer samples them.
        max_length: max tokens of a text; None: what the model and its tokenizer take.
        cut_completions: keep the end of a completion that does not fit, instead of an error.

    Raises:
        TypeError: ``tokenizer`` is none.
        ValueError: it has no pad token, or no chat template though ``format`` is "chat".
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        format: Format,
        *,
        max_length: int | None = None,
        cut_completions: bool = False,
    ) -> None:
        check_tokenizer(tokenizer)
        if format not in FORMATS:
            raise ValueError(f"format: got {format!r}, expected one of {', '.join(FORMATS)}")
        if format == "chat" and not tokenizer.chat_template:
            raise ValueError(
                "format: got 'chat', but the classifier's tokenizer has no chat template; set "
                "tokenizer.chat_template, or use format='joined' or 'pair'"
            )
        self.tokenizer, self.format, self.cut_completions = tokenizer, format, cut_completions
        self.max_length = min(largest_length(model, tokenizer), max_length or 10**9)
        self._special = special_tokens(tokenizer, added=False)
        config = getattr(model, "config", None)
        pad_id = getattr(config, "pad_token_id", None)
        # a model's own: decoders find a text's end by it, RoBERTa and its like number positions so
        self._pads = {"input_ids": tokenizer.pad_token_id if pad_id in (None, -1) else pad_id}
        self._pads["token_type_ids"] = getattr(tokenizer, "pad_token_type_id", 0)
        self._inputs = {*inspect.signature(type(model).forward).parameters}
        if getattr(config, "type_vocab_size", 2) < 2:
            self._inputs -= {"token_type_ids"}

    def encode(
        self,
        prompts: Sequence[str | Chat],
        completions: Sequence[str],
        messages: Sequence[Chat] | None = None,
    ) -> tuple[list[Row], int]:
        """Tokenise, and cut what is too long.

        Args:
            prompts: texts, or chats, which the tokenizer's chat template makes texts of.
            completions: texts.
            messages: chats that end with the completions; "chat" reads these alone.

        Returns:
            The rows, without padding, and how many were cut.

        Raises:
            TooLong: a completion alone does not fit.
            ValueError: a text has no tokens, or the chat template refuses a chat.
        """
        if self.format == "chat":
            found = self._encode_chats(messages)
        elif self.format == "policy":
            found = self._encode_as_policy(prompts, completions)
        else:
            found = self._encode_texts(prompts, completions)
        rows, cut = [], 0
        for i, part in enumerate(found):
            if not part.row["input_ids"]:
                raise ValueError(f"completion {i}: it and its prompt have no tokens")
            row = self._cut(part, i)
            cut += row is not part.row
            rows.append(row)
        return rows, cut

    def pad(self, rows: Sequence[Row], device: torch.device | str) -> dict[str, Tensor]:
        """Return rows as tensors [n, L] int64, padded on the right."""
        return {
            name: nn.utils.rnn.pad_sequence(
                [torch.tensor(row[name], device="cpu") for row in rows],
                batch_first=True,
                padding_value=self._pads.get(name, 0),
            ).to(device)
            for name in rows[0]
        }

    def _encode_texts(
        self, given: Sequence[str | Chat], completions: Sequence[str]
    ) -> list[_Encoded]:
        chats = [prompt for prompt in given if not isinstance(prompt, str)]
        of_chats = iter(encode_prompts(self.tokenizer, chats) if chats else [])
        texts = [p if isinstance(p, str) else str(next(of_chats).text) for p in given]
        prompts = self._without_bos(texts)
        if self.format == "pair":
            completions = [without(text, self._special) for text in completions]
            found = self._tokenize(list(prompts), completions)
            return [self._parts(found, i, None, text) for i, text in enumerate(completions)]
        pairs = [as_data(pair, self._special) for pair in zip(prompts, completions, strict=True)]
        found = self._tokenize([p + c for p, c in pairs])
        return [self._parts(found, i, len(p), c) for i, (p, c) in enumerate(pairs)]

    def _encode_chats(self, messages: Sequence[Chat] | None) -> list[_Encoded]:
        if messages is None:
            raise ValueError(
                "messages: format='chat' reads them, and got none; pass messages=[chat, ...], "
                "each with the completion as its last message"
            )
        texts, starts = [], []
        for i, chat in enumerate(messages):
            content = without(chat[-1]["content"], self._special)
            text = self._render([*chat[:-1], {**chat[-1], "content": content}], i)
            prompt = self._render(chat[:-1], i, add_generation_prompt=True)
            texts.append(text)
            starts.append(common_prefix(text, prompt))
        found = self._tokenize(texts, add_special_tokens=False)  # the template writes them
        return [self._parts(found, i, start, texts[i][start:]) for i, start in enumerate(starts)]

    def _encode_as_policy(
        self, prompts: Sequence[str | Chat], completions: Sequence[str]
    ) -> list[_Encoded]:
        eos = self.tokenizer.eos_token_id
        before = encode_prompts(self.tokenizer, prompts)
        after = self.tokenizer(list(completions), add_special_tokens=False)["input_ids"]
        found = []
        for (prompt, _), completion in zip(before, after, strict=True):
            end = [eos] if eos is not None and completion[-1:] != [eos] else []
            ids = [*prompt, *completion, *end]
            lead = min(self._keeps_first(ids), len(prompt))
            row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
            parts = range(lead, len(prompt)), range(len(prompt), len(prompt) + len(completion))
            found.append(_Encoded(row, *parts))
        return found

    def _render(self, chat: Chat, index: int, **options: Any) -> str:
        if not chat and options:
            return ""
        try:
            return self.tokenizer.apply_chat_template(list(chat), tokenize=False, **options)
        except Exception as error:  # whatever a template raises
            raise ValueError(
                f"messages[{index}]: the reward's chat template refuses it "
                f"({type(error).__name__}: {error})"
            ) from error

    def _tokenize(self, *texts: list[str], add_special_tokens: bool = True) -> Any:
        return self.tokenizer(
            *texts,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=self.tokenizer.is_fast,
            verbose=False,  # of lengths, which are cut here
        )

    def _without_bos(self, prompts: Sequence[str]) -> Sequence[str]:
        """Drop the BOS token that a chat template wrote where the tokenizer adds one too."""
        bos = self.tokenizer.bos_token
        if bos and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]:
            return [prompt.removeprefix(bos) for prompt in prompts]
        return prompts

    def _parts(self, found: Any, i: int, start: int | None, completion: str) -> _Encoded:
        """Return text ``i`` with the tokens of its prompt and its completion.

        ``start`` is the completion's first character in the text; None: it is the second segment.
        """
        row = {k: found[k][i] for k in found if k in self._inputs and k != "offset_mapping"}
        ids = found["input_ids"][i]
        if self.tokenizer.is_fast:
            segments = found.sequence_ids(i)  # None for special tokens
            inside = [j for j, segment in enumerate(segments) if segment is not None]
            ends = [end for _, end in found["offset_mapping"][i]]
            of_completion = [
                j for j in inside if (segments[j] == 1 if start is None else ends[j] > start)
            ]
        else:  # without offsets: as many tokens as the completion has by itself
            special = self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
            inside = [j for j, is_special in enumerate(special) if not is_special]
            count = len(self.tokenizer(completion, add_special_tokens=False)["input_ids"])
            of_completion = inside[len(inside) - count :] if count else []
        first = of_completion[0] if of_completion else len(ids)
        prompt = [j for j in inside if j < first and j >= self._keeps_first(ids)]
        return _Encoded(row, prompt, of_completion)

    def _keeps_first(self, ids: list[int]) -> int:
        """Return 1 where a text begins with BOS or CLS, which is never cut, else 0."""
        kept = {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id} - {None}
        return int(ids[:1] != [] and ids[0] in kept)

    def _cut(self, encoded: _Encoded, index: int) -> Row:
        row, prompt, completion = encoded
        excess = len(row["input_ids"]) - self.max_length
        if excess <= 0:
            return row
        of_completion = max(0, excess - len(prompt))
        room = len(completion) - of_completion
        if of_completion and (room <= 0 or not self.cut_completions):
            raise TooLong(index, len(completion), max(room, 0))
        gone = {*prompt[:excess], *completion[:of_completion]}
        return {name: [v for j, v in enumerate(row[name]) if j not in gone] for name in row}


class _Encoded(NamedTuple):
    """A text's row, and the positions of what may be cut: the prompt's tokens, the completion's."""

    row: Row
    prompt: Sequence[int]
    completion: Sequence[int]


def largest_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the most tokens that a reward model takes, by its positions and its tokenizer."""
    limit = context_limit({"reward": model})
    # positions of RoBERTa's kind begin after the pad id
    table = getattr(getattr(model, "base_model", None), "embeddings", None)
    padding = getattr(getattr(table, "position_embeddings", None), "padding_idx", None)
    taken = 0 if padding is None else padding + 1
    return min(tokenizer.model_max_length, limit.tokens - taken if limit else 10**9)


def common_prefix(one: str, other: str) -> int:
    """Return the number of characters with which both texts begin."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
