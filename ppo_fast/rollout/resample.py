"""Dynamic sampling: prompts whose samples all got one score are replaced by others."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ppo_fast.data.examples import Example
from ppo_fast.data.rollout import Rollout, join, select_rows
from ppo_fast.data.scores import Scores, join_scores


def resample(
    rollout: Rollout,
    scores: Scores,
    prompts: list[Example],
    *,
    sample: Callable[[list[Example]], Rollout],
    score: Callable[[Rollout], Scores],
    draw: Callable[[int], list[Example]] | None,
    most: int,
) -> tuple[Rollout, Scores, dict[str, float]]:
    """Replace the prompts from whose samples nothing can be learned: Yu et al. 2025, section 3.2.

    Args:
        rollout: several samples a prompt.
        scores: those of the rollout.
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
    flat = without_signal(scores.total, size)
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
            scores = join_scores([scores.select(kept), new_scores], width)
        flat = without_signal(scores.total, size)
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
