"""A causal language model that judges by its answer to a question of yes or no."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.checks import check_counts
from ppo_fast.data.batches import batches_by_tokens
from ppo_fast.data.tokens import pad_left, position_ids
from ppo_fast.models.checks import check_policy, context_limit
from ppo_fast.models.parts import base_of
from ppo_fast.models.transformers_internals import output_of
from ppo_fast.rewards.questions import fill, special_tokens, without

logger = logging.getLogger(__name__)

# The judge says so little of both words together that their ratio means little.
LOW_MASS = 0.001

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Question:
    """A question about a response that is answered by one of two words.

    Args:
        template: its text, with the field {completion}, and {prompt} if it wants that.
        yes: the word that speaks for the response.
        no: the word that speaks against it.

    Raises:
        ValueError: there is no field {completion}, or another; or a word is empty.
    """

    template: str
    yes: str = "Yes"
    no: str = "No"

    def __post_init__(self) -> None:
        if not isinstance(self.template, str) or "{completion}" not in self.template:
            raise ValueError(
                f"question: got {self.template!r}, expected a text with the field {{completion}}, "
                "and {prompt} if it wants that"
            )
        if unknown := set(re.findall(r"{(\w+)}", self.template)) - {"prompt", "completion"}:
            raise ValueError(
                f"question: has the field {{{min(unknown)}}}, "
                "expected {completion} and {prompt}"
            )
        for name, word in (("yes", self.yes), ("no", self.no)):
            if not isinstance(word, str) or not word.strip():
                raise ValueError(f"{name}: got {word!r}, expected a word in quotes")


class YesNoModel:
    """A causal language model that answers questions about texts with yes or no, in one pass.

    The answer to a question is log p(yes) - log p(no) at the token that follows it, in float32. A
    word's probability is the sum over its spellings (" Yes", "Yes", "yes" and so on) that are one
    token; if none is, over their first tokens. A token that begins both words counts for neither.

    A question longer than the model takes loses the beginning of its prompt, then that of its
    completion; a warning says so once.

    Args:
        model: a transformers causal LM; None: ``use_reference`` gives one.
        tokenizer: its tokenizer, with a pad token.
        batch_tokens: max tokens of one pass, padding included.
        chat: whether to ask as a user's message in the model's chat template; a plain text ends in
            a line "Answer:". None: where the tokenizer has a template.

    Raises:
        TypeError: ``model`` is no causal LM.
        ValueError: a model without a tokenizer, or a tokenizer without a pad token or without a
            template that is asked for.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_tokens: int = 8192,
        chat: bool | None = None,
    ) -> None:
        check_counts(batch_tokens=batch_tokens)
        if (model is None) != (tokenizer is None):
            raise ValueError("judge: expected a model and its tokenizer, or neither")
        self.batch_tokens, self.chat = batch_tokens, chat
        self.model: Any = None
        self._own = model is not None
        self._warned: set[str] = set()
        if model is not None and tokenizer is not None:
            self._take(model, tokenizer)
            model.eval()

    def use_reference(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Ask ``model``, a trainer's frozen reference, unless the judge has a model of its own."""
        if not self._own:
            self._take(model, tokenizer)

    def to(self, device: torch.device | str) -> YesNoModel:
        """Move a model of the judge's own to ``device``."""
        if self._own:
            self.model.to(device)
        return self

    def _take(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        check_policy(model, "judge")
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "judge: its tokenizer has no pad token; set one, for example "
                "tokenizer.pad_token = tokenizer.eos_token"
            )
        if self.chat and not tokenizer.chat_template:
            raise ValueError("chat: got True, but the judge's tokenizer has no chat template")
        limit = context_limit({"judge": model})
        self.max_length = min(tokenizer.model_max_length, limit.tokens if limit else 10**9)
        self.model, self.tokenizer = model, tokenizer
        self._special = special_tokens(tokenizer)
        self._answer_ids: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self.in_chat = bool(tokenizer.chat_template) if self.chat is None else self.chat
        names = inspect.signature(type(base_of(model)).forward).parameters
        self._arguments = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        self._takes_positions = "position_ids" in names

    def answer_ids(self, question: Question) -> tuple[list[int], list[int]]:
        """Return the ids of the first tokens of a question's words, which tell them apart.

        Raises:
            ValueError: a word has no such token.
        """
        words = (question.yes, question.no)
        if words not in self._answer_ids:
            self._answer_ids[words] = answer_ids(self.tokenizer, *words)
        return self._answer_ids[words]

    def ask(
        self, questions: Sequence[Question], prompts: Sequence[str], completions: Sequence[str]
    ) -> list[float]:
        """Return log p(yes) - log p(no) of each question about its prompt and completion.

        Args:
            questions, prompts, completions: n each.

        Raises:
            RuntimeError: there is no model yet.
            ValueError: a question alone is longer than the model takes, or its words begin alike;
                or the model's logits are not finite.
        """
        if self.model is None:
            raise RuntimeError(
                "judge: has no model; give it one with its tokenizer, or call it in a trainer, "
                "whose reference it then asks"
            )
        if not questions:
            return []
        rows = [
            self._encode(question.template, {"prompt": prompt, "completion": completion})
            for question, prompt, completion in zip(questions, prompts, completions, strict=True)
        ]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device="cpu")
        answers = torch.empty(len(rows), 2, dtype=torch.float32, device="cpu")
        ids = [word for question in questions for word in self.answer_ids(question)]
        words = pad_left(ids, -1, torch.device("cpu")).view(len(rows), 2, -1)
        for batch in batches_by_tokens(lengths, self.batch_tokens):
            logprobs = self._next_logprobs([rows[i] for i in batch.tolist()])
            of_words = words[batch].to(logprobs.device)  # [n, 2, K], -1 where there are fewer
            found = logprobs.gather(1, of_words.clamp(min=0).flatten(1)).view_as(of_words)
            found = found.masked_fill(of_words < 0, -torch.inf).logsumexp(-1)
            answers[batch] = found.cpu()
        mass = float(answers.exp().sum(1).mean())
        if mass < LOW_MASS:
            self._warn(
                "the judge gives its two words together a probability of %.2g on average: it "
                "hardly answers the question",
                mass,
            )
        odds = answers[:, 0] - answers[:, 1]
        if not odds.isfinite().all():
            raise ValueError("judge: its logits are not finite; check its weights and its dtype")
        return odds.tolist()

    @torch.no_grad()
    def _next_logprobs(self, rows: list[list[int]]) -> Tensor:
        """Return the log-probs [n, V] float32 of the token after each row."""
        device = next(self.model.parameters()).device
        ids = pad_left(rows, int(self.tokenizer.pad_token_id), device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(ids.shape[1], device=device) >= ids.shape[1] - lengths[:, None]
        arguments: dict[str, Any] = {"attention_mask": mask.long(), **self._arguments}
        if self._takes_positions:
            arguments["position_ids"] = position_ids(mask)
        output = output_of(self.model, input_ids=ids, use_cache=False, **arguments)
        return output.logits[:, -1].float().log_softmax(-1)

    def _encode(self, template: str, texts: dict[str, str]) -> list[int]:
        """Return the ids of a question, with prompt and completion cut where it is too long."""
        texts = {name: without(text, self._special) for name, text in texts.items()}
        ids = self._ids(fill(template, texts, self._special))
        for name in ("prompt", "completion"):
            while len(ids) > self.max_length and texts[name] and f"{{{name}}}" in template:
                self._warn(
                    "the judge takes %d tokens: longer questions lose the beginning of their "
                    f"{name}",
                    self.max_length,
                )
                share = (len(ids) - self.max_length) / len(ids)
                texts[name] = texts[name][max(int(share * len(texts[name])), 1) :]
                ids = self._ids(fill(template, texts, self._special))
        if len(ids) > self.max_length:
            raise ValueError(
                f"question: has {len(ids)} tokens without any text, and the judge takes "
                f"{self.max_length}; shorten it"
            )
        return ids

    def _ids(self, text: str) -> list[int]:
        if not self.in_chat:
            ids = self.tokenizer(f"{text}\nAnswer:")["input_ids"]
            # an EOS token that the tokenizer appends would end the question
            return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # of templates that know it: the answer is the next token
        )
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def _warn(self, message: str, *arguments: Any) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message, *arguments)


class YesNoJudge:
    """A causal language model, asked a question about each response, as a reward.

    The score is p(yes) / (p(yes) + p(no)) at the token after the question, in [0, 1]: one forward
    pass, no generation.

    Args:
        question: a template with the field {completion}, and {prompt} if it wants that; yes is
            what the reward pays for. What stands in a prompt or a completion is never read as a
            template, and special or added tokens in them become spaces.
        model, tokenizer: the judge; None: the frozen reference of the trainer that uses it.
        yes, no: the two words of the answer; a small model may tell "kind" from "rude" better than
            "Yes" from "No".
        batch_tokens, chat: as ``YesNoModel`` has them.
        log_odds: whether the score is log p(yes) - log p(no), which has no bounds.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Example::

        kind = YesNoJudge("Is this answer kind?\\n\\n{completion}\\n\\nAnswer Yes or No.")
        ppo = PPO(policy, tokenizer, kind)
    """

    def __init__(
        self,
        question: str,
        model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        yes: str = "Yes",
        no: str = "No",
        batch_tokens: int = 8192,
        chat: bool | None = None,
        log_odds: bool = False,
    ) -> None:
        self.question, self.log_odds = Question(question, yes, no), log_odds
        self.judge = YesNoModel(model, tokenizer, batch_tokens=batch_tokens, chat=chat)
        if model is not None:
            self.judge.answer_ids(self.question)

    def use_reference(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Ask the trainer's frozen reference, unless the judge has a model of its own."""
        self.judge.use_reference(model, tokenizer)
        self.judge.answer_ids(self.question)

    def to(self, device: torch.device | str) -> YesNoJudge:
        """Move a model of the judge's own to ``device``."""
        self.judge.to(device)
        return self

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        messages: Sequence[Messages] | None = None,
    ) -> list[float]:
        """Score B responses.

        Args:
            prompts, completions: B texts each.
            messages: B chats that end with the response; {prompt} is then made of the messages
                before it, and not of a rendered template.
        """
        questions = [self.question] * len(completions)
        odds = self.judge.ask(questions, readable_prompts(prompts, messages), completions)
        return odds if self.log_odds else torch.tensor(odds).sigmoid().tolist()


def readable_prompts(
    prompts: Sequence[str], messages: Sequence[Messages] | None = None
) -> list[str]:
    """Return prompts as a judge should read them: of chats the messages, not the template's text.

    Args:
        prompts: texts.
        messages: chats that end with the response, which is left out; None: there are none.
    """
    if messages is None:
        return list(prompts)
    return [_transcript(chat[:-1]) for chat in messages]


def _transcript(chat: Messages) -> str:
    if len(chat) == 1:
        return str(chat[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in chat)


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, yes: str, no: str
) -> tuple[list[int], list[int]]:
    """Return the ids of the first tokens of two words, in several spellings, that tell them apart.

    Raises:
        ValueError: a word has no such token.
    """
    rows = [_spellings(tokenizer, word) for word in (yes, no)]
    firsts = [{row[0] for row in of_word} for of_word in rows]
    own = [firsts[0] - firsts[1], firsts[1] - firsts[0]]
    # a whole word is nothing else; the first part of one may be
    whole = [{row[0] for row in of_word if len(row) == 1} for of_word in rows]
    found = [sorted(ids & words or ids) for ids, words in zip(own, whole, strict=True)]
    if not all(found):
        raise ValueError(
            f"yes, no: {yes!r} and {no!r} begin with the same tokens for this tokenizer; choose "
            "words that differ in their first letters"
        )
    return found[0], found[1]


def _spellings(tokenizer: PreTrainedTokenizerBase, word: str) -> list[list[int]]:
    """Return the ids of a word in several spellings, with and without a space before it."""
    word = word.strip()
    forms = {word, word.lower(), word.upper(), word.capitalize()}
    texts = [f"{space}{form}" for form in sorted(forms) for space in ("", " ")]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    # SentencePiece has "Yes" only within a text, after a special token: at the start it is "▁Yes"
    pieces = [tokenizer.convert_tokens_to_ids(form) for form in sorted(forms)]
    unknown = {None, tokenizer.unk_token_id}
    return [row for row in rows if row] + [[piece] for piece in pieces if piece not in unknown]
