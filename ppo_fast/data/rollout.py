"""Rollout: sampled responses, ready to be scored and trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ppo_fast.data.examples import Example, Message, key_of
from ppo_fast.data.sampling import Sampling
from ppo_fast.data.tokens import Tokens, join_tokens, make_tokens
from ppo_fast.data.trunk_states import TrunkStates, join_trunk_states


@dataclass(frozen=True)
class Rollout:
    """Sampled responses. Legend: B sequences, P prompt and T response tokens, D hidden size.

    tokens: the ids, and all masks by their lengths.
    logprobs: [B, T] float32, of the tokens under softmax(logits / temperature), 0 beyond a
        response; None: the engine does not know them.
    sampling_logprobs: [B, T] float32, under the distribution that was drawn from; None: unknown.
    finished: [B] bool on the CPU, whether a response ended by itself, not at its max length.
    sampling: how they were drawn.
    trunk_states: those of the policy, as decoding computed them; None without a trunk. Each row's
        last token has 0 unless they are ``whole``: no log-prob needs it, but a RewardModel that
        shares the trunk does.
    states: [B, T, D], inputs of the policy's LM head before each token, 0 beyond a response; None
        where they were not asked for, or the model gives logits alone.
    prompts, completions: B texts, for reward functions and for reading; never tokenised again.
    samples_per_prompt: responses to each prompt, in rows next to one another.
    examples: B prompts as they were given, with the other columns of their rows; empty: unknown.
    """

    tokens: Tokens
    logprobs: Tensor | None
    sampling_logprobs: Tensor | None
    finished: Tensor
    sampling: Sampling
    trunk_states: TrunkStates | None = None
    states: Tensor | None = None
    prompts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    samples_per_prompt: int = 1
    examples: list[Example] = field(default_factory=list)

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The other columns of the prompts' rows, B entries each; None where a row has none."""
        return columns_of(self.examples)

    @property
    def messages(self) -> list[list[Message]]:
        """B chats: the prompt's messages, and the completion as the assistant's.

        A prompt of text is one message of the user. A completion that goes on with a message of the
        assistant's is joined to it.
        """
        examples = self.examples or [Example(text) for text in self.prompts]
        return messages_of(examples, self.prompts, self.completions)

    @classmethod
    def from_tokens(
        cls,
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        *,
        pad_id: int = 0,
        device: torch.device | str = "cpu",
        temperature: float = 1.0,
        logprobs: Sequence[Sequence[float]] | None = None,
        sampling_logprobs: Sequence[Sequence[float]] | None = None,
        max_length: int | None = None,
        finished: Sequence[bool] | None = None,
        trained: Sequence[Sequence[bool]] | None = None,
        samples_per_prompt: int = 1,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Rollout:
        """Make a rollout of tokens that were sampled elsewhere, for ``PPO.make_experience``.

        Args:
            prompt_ids, response_ids: B lists of ids, without padding; none is empty.
            pad_id: id at padded positions; any will do.
            device: that of the trainer.
            temperature: by which logits were divided in sampling.
            logprobs: B lists, one number a response token: log-probs under softmax(logits /
                temperature) of the policy that sampled. None: the trainer computes them.
            sampling_logprobs: the same under the distribution that the tokens were drawn from, for
                ``importance`` and ``ratio_to="sampler"``. None: ``logprobs``, if these are given.
            max_length: number of tokens at which responses were cut off. None: the longest's.
            finished: B times, whether a response ended by itself. None: all did.
            trained: B lists, whether each response token is trained on; False for tokens that the
                policy did not choose, such as a tool's output. None: all are.
            samples_per_prompt: responses to each prompt, next to one another.
            columns: for rewards, by name, B entries each. None: none.

        Raises:
            ValueError: counts or lengths differ, or a list is empty.
        """
        columns = columns or {}
        _check_lists(prompt_ids, response_ids, finished, samples_per_prompt, columns)
        tokens = make_tokens(prompt_ids, response_ids, pad_id, torch.device(device))
        if trained is not None:
            tokens = replace(tokens, trained=per_token("trained", trained, tokens).bool())

        def known(name: str, rows: Sequence[Sequence[float]] | None) -> Tensor | None:
            if rows is None:
                return None
            found = per_token(name, rows, tokens).to(device)
            return found.masked_fill(~tokens.response_mask, 0.0)

        of_policy = known("logprobs", logprobs)
        drawn = known("sampling_logprobs", sampling_logprobs)
        ends = [True] * len(tokens) if finished is None else [bool(x) for x in finished]
        ended = torch.tensor(ends, device="cpu")
        length = max_length or max(len(row) for row in response_ids)
        return cls(
            tokens,
            of_policy,
            of_policy if drawn is None else drawn,
            ended,
            Sampling(length, temperature=temperature),
            samples_per_prompt=samples_per_prompt,
            examples=[
                Example(list(ids), {name: column[i] for name, column in columns.items()})
                for i, ids in enumerate(prompt_ids)
            ],
        )


def columns_of(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """Return the columns of B examples; see ``Rollout.columns``."""
    names = dict.fromkeys(name for e in examples for name in e.columns)
    return {name: [e.columns.get(name) for e in examples] for name in names}


def messages_of(
    examples: Sequence[Example], prompts: Sequence[str], completions: Sequence[str]
) -> list[list[Message]]:
    """Return B chats; see ``Rollout.messages``."""
    rows = zip(examples, prompts, completions, strict=True)
    return [_with_answer(e.messages or Example(p).messages, c) for e, p, c in rows]


def _with_answer(messages: list[Message], completion: str) -> list[Message]:
    messages = [dict(message) for message in messages]  # rewards may change what they get
    last = messages[-1]
    if last["role"] == "assistant":
        return [*messages[:-1], last | {"content": (last.get("content") or "") + completion}]
    return [*messages, {"role": "assistant", "content": completion}]


def _check_lists(
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    finished: Sequence[bool] | None,
    samples_per_prompt: int,
    columns: Mapping[str, Sequence[Any]],
) -> None:
    """Raise ValueError where the arguments of ``from_tokens`` do not fit one another."""
    count = len(prompt_ids)
    for name, column in columns.items():
        if len(column) != count:
            raise ValueError(f"columns[{name!r}]: got {len(column)} entries, expected {count}")
    for name, rows in {"prompt_ids": prompt_ids, "response_ids": response_ids}.items():
        if len(rows) != count or not all(map(len, rows)):
            raise ValueError(
                f"{name}: got {len(rows)} lists of lengths {[len(row) for row in rows][:8]}, "
                f"expected {count} lists, none of them empty"
            )
    if samples_per_prompt < 1 or count % samples_per_prompt:
        raise ValueError(
            f"samples_per_prompt: got {samples_per_prompt} for {count} responses, expected a "
            "divisor"
        )
    if finished is not None and len(finished) != count:
        raise ValueError(f"finished: got {len(finished)} entries, expected {count}")


def per_token(name: str, rows: Sequence[Sequence[float]], tokens: Tokens) -> Tensor:
    """Return numbers, a list of each response's length, as [B, T] float32 on the CPU.

    It is 0 beyond a response.

    Raises:
        ValueError: the number of lists, or the length of one, is another; it says ``name``.
    """
    if len(rows) != len(tokens):
        raise ValueError(f"{name}: got {len(rows)} entries, expected {len(tokens)}")
    found = torch.zeros(tokens.response_ids.shape, dtype=torch.float32, device="cpu")
    for i, (row, length) in enumerate(zip(rows, tokens.response_lengths.tolist(), strict=True)):
        if len(row) != length:
            raise ValueError(f"{name}[{i}]: got {len(row)} numbers for {length} tokens")
        found[i, :length] = torch.as_tensor(row, dtype=torch.float32, device="cpu")
    return found


class Sampled(NamedTuple):
    """A prompt and a response of a rollout: their ids, and the prompt's text."""

    prompt_ids: list[int]
    response_ids: list[int]
    text: str


def sampled_pairs(rollout: Rollout | None) -> dict[tuple[Hashable, str], list[Sampled]]:
    """Return what a rollout sampled by (prompt, completion).

    The prompt is the ``key_of`` what was given, or its text.
    """
    found = defaultdict(list)
    if rollout is not None:
        given = [key_of(example.prompt) for example in rollout.examples] or rollout.prompts
        rows = zip(
            given,
            rollout.prompts,
            rollout.completions,
            rollout.tokens.sequences(),
            rollout.tokens.prompt_lengths.tolist(),
            strict=True,
        )
        for key, text, completion, ids, n in rows:
            pair = Sampled(ids[:n].tolist(), ids[n:].tolist(), text)
            for name in {key, text}:
                found[name, completion].append(pair)
    return dict(found)


def select_rows(rollout: Rollout, rows: Tensor) -> Rollout:
    """Return the rows (int64 on the CPU) of a rollout."""
    tokens = rollout.tokens.select(rows)
    index, width = rows.to(tokens.device), tokens.response_ids.shape[1]

    def part(per_token: Tensor | None) -> Tensor | None:
        return None if per_token is None else per_token[index, :width]

    chosen = rows.tolist()
    return replace(
        rollout,
        tokens=tokens,
        logprobs=part(rollout.logprobs),
        sampling_logprobs=part(rollout.sampling_logprobs),
        finished=rollout.finished[rows],
        trunk_states=None if rollout.trunk_states is None else rollout.trunk_states.select(rows),
        states=part(rollout.states),
        prompts=[rollout.prompts[i] for i in chosen],
        completions=[rollout.completions[i] for i in chosen],
        examples=[rollout.examples[i] for i in chosen] if rollout.examples else [],
    )


def join(rollouts: Sequence[Rollout]) -> Rollout:
    """Return the rows of all rollouts, with what is known of all of them."""
    first = rollouts[0]
    width = max(r.tokens.response_ids.shape[1] for r in rollouts)

    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        known = [x for x in tensors if x is not None]
        padded = [pad(x, (*(0, 0) * (x.dim() - 2), 0, width - x.shape[1])) for x in known]
        return torch.cat(padded) if len(known) == len(tensors) else None

    return replace(
        first,
        tokens=join_tokens([r.tokens for r in rollouts]),
        logprobs=joined([r.logprobs for r in rollouts]),
        sampling_logprobs=joined([r.sampling_logprobs for r in rollouts]),
        finished=torch.cat([r.finished for r in rollouts]),
        trunk_states=join_trunk_states([r.trunk_states for r in rollouts]),
        states=joined([r.states for r in rollouts]),
        prompts=[prompt for r in rollouts for prompt in r.prompts],
        completions=[completion for r in rollouts for completion in r.completions],
        examples=[e for r in rollouts for e in r.examples]
        if all(r.examples for r in rollouts)
        else [],
    )
