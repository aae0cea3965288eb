"""Scores of responses, from a module, a transformers classifier or a Python function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Complex, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_fast.data.batches import batches_of
from ppo_fast.data.scores import Scores
from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.models.call_on_rows import call_on_rows, takes_padding
from ppo_fast.models.heads import RewardModel
from ppo_fast.models.passes import Passes
from ppo_fast.nonfinite import NotFiniteError
from ppo_fast.rewards.functions import RewardFunction, call_function, name_of

LARGEST_SCORE = 1e15


def score(
    reward_model: nn.Module | RewardFunction,
    tokens: Tokens,
    prompts: list[str],
    completions: list[str],
    *,
    max_tokens: int,
    passes: Passes | None = None,
    trunk_states: TrunkStates | None = None,
    columns: Mapping[str, Any] | None = None,
) -> Scores:
    """Compute a score for each sequence, or for each response token.

    Args:
        reward_model: a module ``forward(input_ids, attention_mask)`` -> [B] or [B, 1], or [B, L]
            (or [B, L, 1]) with a score for each token, a tuple or an object with ``.logits``, run
            on the sampled tokens; or a function ``f(prompts, completions, **columns)`` that returns
            a number for each (None: it does not judge this one), or a mapping of such lists, whose
            sum is the score.
        max_tokens: max tokens in one call of a module.
        passes: those of a RewardModel's body; None: the module is called.
        trunk_states: the trunk states, those of last tokens too; None: passes start from tokens.
        columns: what functions may ask for by name.

    Returns:
        The total [B] or [B, T] on the device of ``tokens``, finite, 0 where nothing is judged; the
            parts of a mapping, by name; under "" the score itself, NaN where it is not judged.

    Raises:
        ValueError: a wrong count or shape, NaN or infinity (the prompt is named); a column that the
            function takes is not among ``columns``.
        TypeError: something that is not numbers.
        RuntimeError: the reward model or function raised (chained).
    """
    what = f"reward_model {name_of(reward_model)}"
    parts: dict[str, Any] = {}
    if passes is not None:
        assert isinstance(reward_model, RewardModel)
        assert trunk_states is None or trunk_states.whole
        parts[""] = _head_scores(reward_model, passes, tokens, trunk_states, max_tokens, what)
    elif isinstance(reward_model, nn.Module):
        parts[""] = _module_scores(reward_model, tokens, what, max_tokens)
    else:
        found = call_function(reward_model, prompts, completions, columns or {}, what)
        parts = dict(found) if isinstance(found, Mapping) else {"": found}
        if not parts:
            raise ValueError(f"{what}: returned an empty mapping, expected lists of numbers")
        for name in parts if isinstance(found, Mapping) else ():
            if not isinstance(name, str) or not name:
                raise ValueError(f"{what}: named a part {name!r}, expected a text")
    lengths, total = tokens.response_lengths, torch.zeros((), dtype=torch.float32, device="cpu")
    judged: dict[str, Tensor] = {}
    for name, values in parts.items():
        named = what if name == "" else f"{what}, part {name!r}"
        numbers, known = _without_none(values, lengths)
        scores = check_scores(numbers, prompts, named, lengths=lengths)
        if total.dim() and scores.dim() != total.dim():
            raise ValueError(
                f"{named}: got scores of shape {list(scores.shape)}, and others before"
            )
        total = total + scores
        sums = scores if scores.dim() == 1 else scores.sum(1)
        known = None if known is None else known[: len(sums)]
        judged[name] = sums if known is None else sums.masked_fill(~known, math.nan)
    if "" not in judged:
        known = ~torch.stack(list(judged.values())).isnan().all(0)
        sums = total if total.dim() == 1 else total.sum(1)
        judged = {"": sums.masked_fill(~known, math.nan)} | judged
    return Scores(total.to(tokens.device), judged)


def _without_none(values: Any, lengths: Tensor) -> tuple[Any, Tensor | None]:
    """Return scores with 0 for None, and which [B] are numbers; None: all are."""
    if not isinstance(values, Tensor) and hasattr(values, "tolist"):
        values = values.tolist()  # of numpy or pandas, which may hold objects
    if not isinstance(values, (list, tuple)):
        return values, None
    rows = [v.tolist() if getattr(v, "ndim", 0) == 1 and len(v) != 1 else v for v in values]
    if all(row is not None for row in rows):
        return rows, None
    known = torch.tensor([row is not None for row in rows], device="cpu")
    for_tokens = any(isinstance(row, (list, tuple)) for row in rows)
    zeros = [[0.0] * n if for_tokens else 0.0 for n in lengths.tolist()]
    # lists of the wrong length are an error of check_scores
    pairs = zip(rows, zeros, strict=False)
    return [zero if row is None else row for row, zero in pairs] + rows[len(zeros) :], known


def check_scores(
    scores: Any, prompts: Sequence[str], what: str = "scores", *, lengths: Tensor | None = None
) -> Tensor:
    """Return ``scores`` as a float32 tensor, [B] or [B, T], on the CPU.

    ``lengths`` [B] are those of the responses; None: scores for tokens are refused. Such scores may
    be B lists of these lengths; beyond a response they become 0.

    Raises:
        TypeError: they are not numbers.
        ValueError: their count is not that of ``prompts``, or one is NaN or infinite.
    """
    if isinstance(scores, np.ndarray) and scores.ndim == 2:
        scores = torch.as_tensor(scores, dtype=torch.float32, device="cpu")
    if isinstance(scores, Mapping):
        raise TypeError(f"{what}: got a mapping, expected a list of numbers, one a prompt")
    if isinstance(scores, Tensor):
        if scores.is_complex() or scores.is_meta:
            raise TypeError(f"{what}: got {scores.dtype} on {scores.device}, expected real numbers")
        scores = scores.detach().to_dense().to("cpu", torch.float32)
    else:
        try:
            scores = _tensor(list(scores), lengths)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise TypeError(
                f"{what}: expected a list of numbers, one a prompt ({error})"
            ) from error
    if lengths is not None and scores.dim() == 2:
        scores = _of_tokens(scores, lengths, what)
    elif scores.shape != (len(prompts),):
        raise ValueError(
            f"{what}: got shape {list(scores.shape)}, expected {[len(prompts)]}, a number a prompt"
        )
    worst = scores if scores.dim() == 1 else _worst(scores)
    for prompt, value in zip(prompts, worst.tolist(), strict=True):
        if not math.isfinite(value):
            raise NotFiniteError(
                f"{what}: got {value} for the prompt {prompt!r}; scores are finite"
            )
        if abs(value) > LARGEST_SCORE:
            raise ValueError(
                f"{what}: got {value} for the prompt {prompt!r}, expected at most "
                f"{LARGEST_SCORE:g} in size: the square of a larger one overflows in the losses"
            )
    return scores


def _tensor(scores: list[Any], lengths: Tensor | None) -> Tensor:
    """Return numbers, or lists of numbers of these lengths, as a tensor."""
    rows = [score for score in scores if isinstance(score, (list, tuple))]
    if lengths is None or len(rows) < max(len(scores), 1):
        numbers = [_number(score) for score in scores]
        return torch.tensor(numbers, dtype=torch.float32, device="cpu")
    width = max(map(len, rows))
    padded = [[*map(_number, row), *[0.0] * (width - len(row))] for row in rows]
    if [len(row) for row in rows] != lengths.tolist():
        raise ValueError(
            f"got lists of {[len(row) for row in rows][:8]} numbers for responses of "
            f"{lengths.tolist()[:8]} tokens"
        )
    return torch.tensor(padded, dtype=torch.float32, device="cpu")


def _of_tokens(scores: Tensor, lengths: Tensor, what: str) -> Tensor:
    """Check the shape of scores [B, T], and set to 0 what is beyond a response."""
    expected = [len(lengths), int(lengths.max())]
    if list(scores.shape) != expected:
        raise ValueError(
            f"{what}: got shape {list(scores.shape)}, expected {[len(lengths)]}, a number a "
            f"prompt, or {expected}, a number a response token"
        )
    beyond = torch.arange(scores.shape[1], device="cpu") >= lengths[:, None]
    return scores.masked_fill(beyond, 0.0)


def _worst(scores: Tensor) -> Tensor:
    """Return each row's number that is not finite, or else its largest in size."""
    sizes = torch.where(scores.isfinite(), scores.abs(), math.inf)
    return scores.gather(1, sizes.argmax(1, keepdim=True))[:, 0]


def _number(score: Any) -> float:
    is_complex = isinstance(score, Complex) and not isinstance(score, Real)
    if is_complex or isinstance(score, (str, bytes)):
        raise TypeError(f"got {score!r}")
    return float(score.detach() if isinstance(score, Tensor) else score)


def check_reward_model(reward_model: Any, labels: int = 1) -> None:
    """Check, before any model runs, that ``reward_model`` can give one score per sequence.

    ``labels`` is how many labels a classifier may have.

    Raises:
        TypeError: it is neither a module nor a function.
        ValueError: it is a classifier with several labels, or without a pad token.
    """
    if not isinstance(reward_model, nn.Module) and not callable(reward_model):
        raise TypeError(
            f"reward_model: got {type(reward_model).__name__}, expected a torch.nn.Module with "
            "forward(input_ids, attention_mask) or a function f(prompts, completions) -> "
            "list[float], or a list or dict of these"
        )
    if isinstance(reward_model, nn.Module) and type(reward_model).forward is nn.Module.forward:
        raise TypeError(
            f"reward_model: {type(reward_model).__name__} has no forward(input_ids, attention_mask)"
        )
    if isinstance(reward_model, type):
        raise TypeError(
            f"reward_model: got the class {reward_model.__name__}, expected an instance of it"
        )
    if not isinstance(reward_model, PreTrainedModel) or not takes_padding(reward_model):
        return
    kind, config = type(reward_model).__name__, reward_model.config
    if config.num_labels != labels:
        raise ValueError(
            f"reward_model: {kind} has num_labels={config.num_labels}, expected 1 (one score per "
            "sequence); pass ClassifierReward(reward_model, its_tokenizer, label=...), which "
            "scores by one of the labels"
        )
    if config.pad_token_id is None or config.pad_token_id < 0:
        raise ValueError(
            f"reward_model: {kind} has pad_token_id={config.pad_token_id}, and needs one to find "
            "the end of a sequence; set reward_model.config.pad_token_id = tokenizer.pad_token_id"
        )


@torch.no_grad()
def _head_scores(
    reward_model: RewardModel,
    passes: Passes,
    tokens: Tokens,
    trunk_states: TrunkStates | None,
    max_tokens: int,
    what: str,
) -> Tensor:
    """Compute the scores [B] of a RewardModel, on its own device."""
    device = next(reward_model.parameters()).device
    scores = torch.empty(len(tokens), dtype=torch.float32, device=device)
    for rows in batches_of(tokens, max_tokens, packed=passes.packed):
        part = tokens.select(rows).to(device)
        of_rows = None if trunk_states is None else trunk_states.select(rows)
        try:
            states = passes.states(part, of_rows, last=True).last(part)
            scores[rows.to(device)] = reward_model.reward_head(states).squeeze(-1).float()
        except Exception as error:
            raise RuntimeError(f"{what} raised {type(error).__name__}: {error}") from error
    return scores.to(tokens.device)


@torch.no_grad()
def _module_scores(module: nn.Module, tokens: Tokens, what: str, max_tokens: int) -> Tensor:
    sequences, weight = tokens.sequences(), next(module.parameters(), None)
    if weight is not None:  # it may live on a device of its own
        sequences = [ids.to(weight.device) for ids in sequences]
    rows = call_on_rows(module, sequences, max_tokens=max_tokens, what=what)
    rows = [row.to(tokens.device) for row in rows]
    if all(row.numel() == 1 for row in rows):
        return torch.stack([row.reshape(()) for row in rows])
    for row, ids in zip(rows, sequences, strict=True):
        if row.numel() != len(ids):
            raise ValueError(
                f"{what} returned {list(row.shape)} for a sequence of {len(ids)} tokens, expected "
                "one score, or one a token"
            )
    # a token's score is read after it, where a value is read before it
    return tokens.at_response([row.reshape(-1)[1:] for row in rows])
