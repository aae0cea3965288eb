"""Texts that a judge reads as data: they form no special tokens, in questions' templates too."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase


def fill(template: str, texts: Mapping[str, str], special: Sequence[str] = ()) -> str:
    """Put texts into a template's fields, {prompt} for ``texts["prompt"]`` and so on.

    It is done in one pass over the template: fields and braces within a text stay as they are.

    Args:
        template: a text with fields.
        texts: by the names of the fields.
        special: special tokens. They become spaces in the texts, where texts and the template
            around them form one together too; those of the template itself stay.
    """
    fields = "|".join(map(re.escape, texts))
    pieces = re.split(rf"\{{({fields})\}}", template)  # the template's and names of texts in turn
    pieces[1::2] = [texts[name] for name in pieces[1::2]]
    return "".join(as_data(pieces, special))


def as_data(pieces: Sequence[str], special: Sequence[str]) -> list[str]:
    """Return parts of a text, of which each second one forms no special token.

    Args:
        pieces: parts that stay as they are and parts that are data, in turn.
        special: the tokens, as ``special_tokens`` returns them.
    """
    pieces = list(pieces)
    pieces[1::2] = [without(text, special) for text in pieces[1::2]]
    while found := _formed(pieces, special):
        index, start, end = found
        pieces[index] = f"{pieces[index][:start]} {pieces[index][end:]}"
    return pieces


def without(text: str, special: Sequence[str]) -> str:
    """Return a text with spaces for special tokens, with which it could pose as another speaker.

    Args:
        text: any text.
        special: the tokens, as ``special_tokens`` returns them.
    """
    # again until there are none: a space may complete a token that has one in it
    while found := [token for token in special if token in text]:
        text = re.sub("|".join(map(re.escape, found)), " ", text)
    return text


def special_tokens(tokenizer: PreTrainedTokenizerBase, *, added: bool = True) -> list[str]:
    """Return what a tokenizer reads as one token wherever it stands in a text, longest first.

    These are its special tokens, such as the names of roles in chats, without those of white space.

    Args:
        tokenizer: any.
        added: whether other tokens added to its vocabulary are among them, such as "<think>".
    """
    tokens = tokenizer.added_tokens_decoder.values()
    contents = [token.content for token in tokens if added or token.special]
    found = {token for token in (*tokenizer.all_special_tokens, *contents) if token.strip()}
    return sorted(found, key=lambda token: (-len(token), token))


def _formed(pieces: Sequence[str], special: Sequence[str]) -> tuple[int, int, int] | None:
    """Return index, start and end of a text's part in a special token; None: there is none.

    Texts are the pieces with odd indices; of several that form a token, it is the last. White space
    is no part: as a space it would stay.
    """
    whole = "".join(pieces)
    for token in special:
        at = whole.find(token)
        while at >= 0:
            offset = len(whole)
            for i in reversed(range(len(pieces))):
                offset -= len(pieces[i])
                start, end = max(at - offset, 0), min(at + len(token) - offset, len(pieces[i]))
                if i % 2 and pieces[i][start:end].strip():
                    return i, start, end
            at = whole.find(token, at + 1)
    return None
