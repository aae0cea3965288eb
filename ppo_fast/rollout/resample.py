"""Dynamic sampling: prompts whose samples all got one score are replaced by others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppo_fast.data.prompts import Prompt
from ppo_fast.data.rollout import Rollout, join, select_rows


def resample(
    rollout: Rollout,
    scores: Tensor,
    prompts: list[Prompt],
    *,
    sample: Callable[[list[Prompt]], Rollout],
    score: Callable[[Rollout], Tensor],
    draw: Callable[[int], list[Prompt]] | None,
    most: int,
) -> tuple[Rollout, Tensor, dict[str, float]]:
    """Replace the prompts from whose samples nothing can be learned: Yu et al. 2025, section 3.2.

    Args:
        rollout: several samples a prompt.
        scores: [B] or [B, T].
        prompts: of the rollout, each once.
        sample: samples responses to prompts.
        score: computes their scores.
        draw: gives a number of other prompts; None: the same are sampled once more.
        most: max number of times to do it; prompts that are left then are kept.

    Returns:
        The rollout, its scores, and the metrics prompts_resampled (a number) and
            prompts_without_signal (share of those that were kept).
    """
    size, count = rollout.samples_per_prompt, 0
    flat = without_signal(scores, size)
    for _ in range(most):
        if not flat.any():
            break
        again = [prompt for prompt, drop in zip(prompts, flat.tolist(), strict=True) if drop]
        kept_prompts = [p for p, drop in zip(prompts, flat.tolist(), strict=True) if not drop]
        again = again if draw is None else draw(len(again))
        prompts, count = kept_prompts + again, count + len(again)
        new = sample(again)
        new_scores = score(new)
        if flat.all():
            rollout, scores = new, new_scores
        else:
            kept = (~flat).repeat_interleave(size).nonzero().flatten()
            rollout = join([select_rows(rollout, kept), new])
            width = rollout.tokens.response_ids.shape[1]
            scores = _joined(scores[kept.to(scores.device)], new_scores, width)
        flat = without_signal(scores, size)
    metrics = {
        "prompts_resampled": float(count),
        "prompts_without_signal": float(flat.float().mean()),
    }
    return rollout, scores, metrics


def without_signal(scores: Tensor, samples_per_prompt: int) -> Tensor:
    """Return for each prompt whether its samples all have one score: bool [prompts], on the CPU."""
    totals = scores if scores.dim() == 1 else scores.sum(1)
    groups = totals.view(-1, samples_per_prompt)
    return (groups == groups[:, :1]).all(1).cpu()


def _joined(first: Tensor, second: Tensor, width: int) -> Tensor:
    """Join scores [B] or [B, T]; the latter get ``width`` columns, zeros on the right or cut."""
    if first.dim() == 1:
        return torch.cat([first, second])
    pad = torch.nn.functional.pad
    return torch.cat([pad(x, (0, width - x.shape[1])) for x in (first, second)])
