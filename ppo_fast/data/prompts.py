"""Prompts as token ids, checked before any model runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ppo_fast.data.examples import Example, as_examples


class Limit(NamedTuple):
    """Max number of tokens of a sequence, and whose limit it is."""

    tokens: int
    of: str


class PromptTokens(NamedTuple):
    """A prompt as the model reads it: its ids, and its text where it was not given as ids."""

    ids: list[int]
    text: str | None


def encode_prompts(tokenizer: Any, prompts: Iterable[Any]) -> list[PromptTokens]:
    """Tokenise prompts for a model that continues them.

    Ids stay as they are. Texts are tokenised as the tokenizer does by default. Of a BOS token that
    both a text and the tokenizer put first, one remains. An EOS token that the tokenizer appends is
    removed: a response follows. Chats become texts by the tokenizer's chat template, with what
    begins a response at their end, and get no other special tokens; a chat whose last message is
    the assistant's is continued within this message. Columns "tools" and "chat_template_kwargs" of
    a chat's row reach the template.

    Raises:
        ValueError: there is a chat, and no chat template, or the template refuses it.
    """
    examples = as_examples(prompts)
    texts = [
        _chat_text(tokenizer, example, i) if _is_chat(example) else example.prompt
        for i, example in enumerate(examples)
    ]
    plain = [text for text, e in zip(texts, examples, strict=True) if isinstance(e.prompt, str)]
    chats = [text for text, e in zip(texts, examples, strict=True) if _is_chat(e)]
    of_plain = iter(tokenizer(plain)["input_ids"] if plain else [])
    of_chats = iter(tokenizer(chats, add_special_tokens=False)["input_ids"] if chats else [])
    encoded = []
    for text, example in zip(texts, examples, strict=True):
        if not isinstance(text, str):
            encoded.append(PromptTokens([*text], None))
        elif _is_chat(example):
            encoded.append(PromptTokens(list(next(of_chats)), text))
        else:
            encoded.append(PromptTokens(_without_extra(tokenizer, text, next(of_plain)), text))
    return encoded


def _is_chat(example: Example) -> bool:
    return not isinstance(example.prompt, str) and bool(example.messages)


def _without_extra(tokenizer: Any, text: str, ids: Sequence[int]) -> list[int]:
    """Return a text's ids without a second BOS token and without an EOS token of the tokenizer."""
    bos, eos, ids = tokenizer.bos_token, tokenizer.eos_token, list(ids)
    if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
        written_twice = text.startswith(bos * 2)
        ids = ids if written_twice else ids[1:]
    if eos and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(eos):
        ids = ids[:-1]
    return ids


def _chat_text(tokenizer: Any, example: Example, number: int) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"prompts[{number}]: is a chat, and the tokenizer has no chat template; set "
            "tokenizer.chat_template, or pass texts"
        )
    goes_on = example.messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            example.messages,
            tools=example.columns.get("tools"),
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            **(example.columns.get("chat_template_kwargs") or {}),
        )
    except Exception as error:  # jinja's, and whatever a template raises by itself
        raise ValueError(
            f"prompts[{number}]: the tokenizer's chat template refuses it "
            f"({type(error).__name__}: {error})"
        ) from error


def cut_left(ids: list[int], room: int, bos_id: int | None) -> list[int]:
    """Return the last ``room`` ids; a BOS token at the start stays there."""
    if len(ids) <= room or room < 1:
        return ids
    if ids[0] == bos_id and room > 1:
        return [ids[0], *ids[len(ids) - room + 1 :]]
    return ids[len(ids) - room :]


def check_prompt_ids(
    prompts: Sequence[PromptTokens],
    max_length: int,
    limit: Limit | None,
    *,
    vocab_size: int,
    mend: str = "",
) -> None:
    """Check that no prompt is empty, and that each leaves room for ``max_length`` response tokens.

    ``mend`` ends the error for one that does not.

    Raises:
        ValueError: a prompt is empty, leaves no room, or holds an id that is not below
            ``vocab_size``; it is named.
    """
    for i, (ids, text) in enumerate(prompts):
        if not ids:
            raise ValueError(
                f"prompts[{i}]: {text if text is not None else ids!r} is empty after tokenisation; "
                "remove it, or give the model something to start from"
            )
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            raise ValueError(
                f"prompts[{i}]: holds the id {wrong}, expected ids from 0 to {vocab_size - 1}, "
                "the policy's vocabulary"
            )
        if limit is not None and len(ids) + max_length > limit.tokens:
            words = text if text is not None else str(ids)
            short = words if len(words) <= 60 else words[:57] + "..."
            found = f"prompts[{i}]: {short!r} has {len(ids)} tokens"
            if limit.of.startswith("max_prompt_length"):
                raise ValueError(f"{found}, which exceeds {limit.of}; raise it{mend}")
            room = limit.tokens - len(ids)
            lower = f", lower max_length to {room}" if room > 0 else ""
            raise ValueError(
                f"{found}; with max_length={max_length} that exceeds {limit.of}; shorten the "
                f"prompt{lower}{mend}"
            )


def check_lengths(lengths: Sequence[int], limit: Limit | None) -> None:
    """Raise ValueError if one of the sequences' ``lengths`` exceeds the limit."""
    longest = max(lengths, default=0)
    if limit is not None and longest > limit.tokens:
        raise ValueError(f"the longest sequence has {longest} tokens, which exceeds {limit.of}")
