"""Scores of whole responses, from a module, a transformers classifier or a Python function."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Complex, Real
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_fast.data.batches import batches_by_tokens
from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.models.call_on_rows import call_on_rows, takes_padding
from ppo_fast.models.heads import RewardModel
from ppo_fast.models.trunk import Split

LARGEST_SCORE = 1e15

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


def score(
    reward_model: nn.Module | RewardFunction,
    tokens: Tokens,
    prompts: list[str],
    completions: list[str],
    *,
    max_tokens: int,
    split: Split | None = None,
    trunk_states: TrunkStates | None = None,
) -> Tensor:
    """Compute a score for each sequence.

    Args:
        reward_model: a module ``forward(input_ids, attention_mask)`` -> [B], [B, 1], a tuple or an
            object with ``.logits``, run on the sampled tokens; or a function ``f(prompts,
            completions) -> list[float]``.
        max_tokens: max tokens in one call of a module.
        split: Split of a RewardModel whose lower layers are the policy's trunk; None: they are not.
        trunk_states: the trunk states, those of last tokens too; needed with ``split``.

    Returns:
        [B] float32 on the device of ``tokens``, finite.

    Raises:
        ValueError: a wrong count or shape, NaN or infinity (the prompt is named).
        TypeError: something that is not numbers.
        RuntimeError: the reward model or function raised (chained).
    """
    what = f"reward_model {getattr(reward_model, '__name__', type(reward_model).__name__)}"
    if split is not None:
        assert isinstance(reward_model, RewardModel)
        assert trunk_states is not None
        assert trunk_states.whole
        scores = _scores_from_trunk(reward_model, split, tokens, trunk_states, max_tokens)
    elif isinstance(reward_model, nn.Module):
        scores = _module_scores(reward_model, tokens, what, max_tokens)
    else:
        scores = _function_scores(reward_model, prompts, completions, what)
    return check_scores(scores, prompts, what).to(tokens.device)


def check_scores(scores: Any, prompts: Sequence[str], what: str = "scores") -> Tensor:
    """Return ``scores`` as a float32 tensor [B] on the CPU.

    Raises:
        TypeError: they are not numbers.
        ValueError: their count is not that of ``prompts``, or one is NaN or infinite.
    """
    if isinstance(scores, Mapping):
        raise TypeError(f"{what}: got a mapping, expected a list of numbers, one a prompt")
    if isinstance(scores, Tensor):
        if scores.is_complex() or scores.is_meta:
            raise TypeError(f"{what}: got {scores.dtype} on {scores.device}, expected real numbers")
        scores = scores.detach().to("cpu", torch.float32)
    else:
        try:
            numbers = [_number(s) for s in scores]
            scores = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise TypeError(
                f"{what}: expected a list of numbers, one a prompt ({error})"
            ) from error
    if scores.shape != (len(prompts),):
        raise ValueError(
            f"{what}: got shape {list(scores.shape)}, expected {[len(prompts)]}, a number a prompt"
        )
    for prompt, value in zip(prompts, scores.tolist(), strict=True):
        if not math.isfinite(value):
            raise ValueError(f"{what}: got {value} for the prompt {prompt!r}; scores are finite")
        if abs(value) > LARGEST_SCORE:
            raise ValueError(
                f"{what}: got {value} for the prompt {prompt!r}, expected at most "
                f"{LARGEST_SCORE:g} in size: the square of a larger one overflows in the losses"
            )
    return scores


def _number(score: Any) -> float:
    is_complex = isinstance(score, Complex) and not isinstance(score, Real)
    if is_complex or isinstance(score, (str, bytes)):
        raise TypeError(f"got {score!r}")
    return float(score)


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
            "list[float]"
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
def _scores_from_trunk(
    reward_model: RewardModel,
    split: Split,
    tokens: Tokens,
    trunk_states: TrunkStates,
    max_tokens: int,
) -> Tensor:
    scores = torch.empty(len(tokens), dtype=torch.float32, device=tokens.device)
    for rows in batches_by_tokens(tokens.lengths, max_tokens):
        part = tokens.select(rows)
        states = split.states(part, trunk_states.select(tokens, rows))
        last = part.lengths - 1
        scores[rows.to(tokens.device)] = reward_model.read(states, last.to(tokens.device)).float()
    return scores


@torch.no_grad()
def _module_scores(module: nn.Module, tokens: Tokens, what: str, max_tokens: int) -> Tensor:
    rows = call_on_rows(module, tokens.sequences(), max_tokens=max_tokens, what=what)
    if any(row.dim() != 0 and row.numel() != 1 for row in rows):
        raise ValueError(f"{what} returned a number a token, expected one a sequence [B] or [B, 1]")
    return torch.stack([row.reshape(()) for row in rows])


def _function_scores(
    function: RewardFunction, prompts: list[str], completions: list[str], what: str
) -> Any:
    try:
        scores = function(list(prompts), list(completions))
        return list(scores) if isinstance(scores, Iterator) else scores  # it may raise here
    except (Exception, SystemExit) as error:
        raised = f"{what} raised {type(error).__name__}: {error}"
        raise RuntimeError(f"{raised}{_place(error)}") from error


def _place(error: BaseException) -> str:
    """Return the file and line of the user's code in which an error arose, to be appended."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is ours
    library = os.path.dirname(os.__file__)  # which holds site-packages too
    own = [f for f in frames if not f.filename.startswith((library, "<frozen"))]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
