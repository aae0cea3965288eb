"""Rollout: sampled responses, ready to be scored and trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ppo_fast.data.sampling import Sampling
from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.data.trunk_states import TrunkStates


@dataclass(frozen=True)
class Rollout:
    """Sampled responses. Legend: B sequences, P prompt and T response tokens, D hidden size.

    tokens: the ids, and all masks by their lengths.
    logprobs: [B, T] float32, of the tokens under softmax(logits / temperature), 0 beyond a
        response; None: the engine does not know them.
    sampling_logprobs: [B, T] float32, under the distribution that was drawn from.
    finished: [B] bool on the CPU, whether a response ended by itself, not at its max length.
    sampling: how they were drawn.
    trunk_states: those of the policy, as decoding computed them; None without a trunk. Each row's
        last token has 0 unless they are ``whole``: no log-prob needs it, but a RewardModel that
        shares the trunk does.
    states: [B, T, D], inputs of the policy's LM head before each token, 0 beyond a response; None
        where they were not asked for, or the model gives logits alone.
    prompts, completions: B texts, for reward functions and for reading; never tokenised again.
    """

    tokens: Tokens
    logprobs: Tensor | None
    sampling_logprobs: Tensor
    finished: Tensor
    sampling: Sampling
    trunk_states: TrunkStates | None = None
    states: Tensor | None = None
    prompts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)

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
        finished: Sequence[bool] | None = None,
    ) -> Rollout:
        """Make a rollout of tokens that were sampled elsewhere, for ``PPO.make_experience``.

        Args:
            prompt_ids, response_ids: B lists of ids, without padding; none is empty.
            pad_id: id at padded positions; any will do.
            device: that of the trainer.
            temperature: by which logits were divided in sampling.
            logprobs: B lists, one number a response token: log-probs under softmax(logits /
                temperature) of the policy that sampled. None: the trainer computes them.
            finished: B times, whether a response ended by itself. None: all did.

        Raises:
            ValueError: counts or lengths differ, or a list is empty.
        """
        pairs = {"prompt_ids": prompt_ids, "response_ids": response_ids}
        for name, rows in pairs.items():
            if len(rows) != len(prompt_ids) or not all(map(len, rows)):
                raise ValueError(
                    f"{name}: got {len(rows)} lists of lengths {[len(row) for row in rows][:8]}, "
                    f"expected {len(prompt_ids)} lists, none of them empty"
                )
        tokens = make_tokens(prompt_ids, response_ids, pad_id, torch.device(device))
        known = torch.zeros(tokens.response_ids.shape, dtype=torch.float32, device="cpu")
        for name, given in (("logprobs", logprobs), ("finished", finished)):
            if given is not None and len(given) != len(tokens):
                raise ValueError(f"{name}: got {len(given)} entries, expected {len(tokens)}")
        for i, row in enumerate(() if logprobs is None else logprobs):
            if len(row) != len(response_ids[i]):
                raise ValueError(
                    f"logprobs[{i}]: got {len(row)} numbers for {len(response_ids[i])} tokens"
                )
            known[i, : len(row)] = torch.as_tensor(row, device="cpu")
        ends = [True] * len(tokens) if finished is None else [bool(x) for x in finished]
        ended = torch.tensor(ends, device="cpu")
        length = max(len(row) for row in response_ids)
        return cls(
            tokens,
            None if logprobs is None else known.to(device),
            known.to(device),
            ended,
            Sampling(length, temperature=temperature),
        )


def sampled_ids(
    rollout: Rollout | None,
) -> dict[tuple[str, str], list[tuple[list[int], list[int]]]]:
    """Return the ids (of prompt, of response) of a rollout by (prompt, completion)."""
    found = defaultdict(list)
    if rollout is not None:
        rows = zip(
            rollout.prompts,
            rollout.completions,
            rollout.tokens.sequences(),
            rollout.tokens.prompt_lengths.tolist(),
            strict=True,
        )
        for prompt, completion, ids, n in rows:
            found[prompt, completion].append((ids[:n].tolist(), ids[n:].tolist()))
    return dict(found)
