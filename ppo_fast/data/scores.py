"""Scores: what the rewards of a trainer give to responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Scores:
    """Scores of B responses of at most T tokens.

    total: [B] or [B, T] float32, the weighted sum of all rewards.
    parts: of each reward, and of each part of one, by name: [B] float32 on the CPU, before weights;
        NaN where a reward does not judge the response.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def select(self, rows: Tensor) -> Scores:
        """Return the scores of some rows (int64 on the CPU)."""
        parts = {name: part[rows] for name, part in self.parts.items()}
        return Scores(self.total[rows.to(self.total.device)], parts)

    def metrics(self) -> dict[str, float]:
        """Return mean and standard deviation of each reward, and the share that it judges."""
        metrics = {}
        for name, part in self.parts.items():
            judged = part[~part.isnan()]
            if len(judged):
                metrics[f"reward/{name}/mean"] = float(judged.mean())
                metrics[f"reward/{name}/std"] = float(judged.std(correction=0))
            if len(judged) < len(part):
                metrics[f"reward/{name}/judged"] = len(judged) / len(part)
        return metrics


def join_scores(scores: Sequence[Scores], width: int) -> Scores:
    """Return the rows of all; scores [B, T] get ``width`` columns, zeros on the right or cut."""
    totals = [s.total for s in scores]
    if totals[0].dim() == 2:
        totals = [pad(total, (0, width - total.shape[1])) for total in totals]
    names = dict.fromkeys(name for s in scores for name in s.parts)
    unknown = [torch.full((len(s.total),), float("nan"), device="cpu") for s in scores]
    parts = {
        name: torch.cat([s.parts.get(name, nan) for s, nan in zip(scores, unknown, strict=True)])
        for name in names
    }
    return Scores(torch.cat(totals), parts)
