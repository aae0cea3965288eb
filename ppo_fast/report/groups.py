"""Which metrics a page shows together: groups of charts, and bands around a mean."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# Titles, and how the names of their metrics begin; of several beginnings the longest decides.
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Reward", ("mean_reward", "reward")),
    ("Distance from the reference", ("kl_", "ref_kl")),
    (
        "Responses",
        (
            "response_length",
            "finished_",
            "eos_share",
            "entropy",
            "distinct_",
            "repetition",
            "prompts_",
        ),
    ),
    (
        "Update of the policy",
        (
            "policy_",
            "skipped_",
            "clip_",
            "dual_clip_",
            "approx_kl",
            "ratio_",
            "max_log_ratio",
            "mean_",
        ),
    ),
    ("Value function", ("value_", "return_", "explained_variance")),
    ("Rollout against update", ("first_max_log_ratio", "sampling_", "effective_sample_size")),
    (
        "Schedules and sizes",
        ("learning_rate", "value_learning_rate", "kl_coefficient", "entropy_coefficient", "tokens"),
    ),
    ("Speed", ("perf/",)),
    ("Others", ("",)),
)
QUANTILE = re.compile(r"(.+)_p(\d\d)")


class Picture(NamedTuple):
    """The metrics that one chart draws.

    metric: its line.
    low, high: metrics that bound a band, or None.
    middle: metric of a line within the band, or None.
    deviation: metric of the band's half width around the line, or None.
    """

    metric: str
    low: str | None = None
    high: str | None = None
    middle: str | None = None
    deviation: str | None = None

    def __str__(self) -> str:
        """Return what the band is; empty without one."""
        if self.deviation:
            return f"band: ± {self.deviation}"
        if self.low is None:
            return ""
        middle = f"; dotted: {self.middle}" if self.middle else ""
        return f"band: {self.low} to {self.high}{middle}"


def pictures(metrics: Iterable[str]) -> dict[str, list[Picture]]:
    """Return the charts of each group that has some; metrics of a band have none of their own."""
    names = [name for name in metrics if not name.startswith("time/")]
    made = [_picture(name, names) for name in names]
    within = {name for one in made for name in (one.low, one.high, one.middle) if name}
    within |= {one.deviation for one in made if one.deviation and one.deviation != "reward_std"}
    found: dict[str, list[Picture]] = {title: [] for title, _ in GROUPS}
    for one in made:
        if one.metric not in within:
            found[_group(one.metric)].append(one)
    return {title: group for title, group in found.items() if group}


def _group(metric: str) -> str:
    fitting = [
        (len(start), title) for title, starts in GROUPS for start in starts
        if metric.startswith(start)
    ]  # fmt: skip
    return max(fitting, key=lambda one: one[0])[1]


def _picture(metric: str, names: list[str]) -> Picture:
    stem = metric.removesuffix("_mean")
    deviation = "reward_std" if metric == "mean_reward" else re.sub("/mean$", "/std", metric)
    if deviation in names and deviation != metric:
        return Picture(metric, deviation=deviation)
    quantiles = sorted(
        (int(found[2]), name) for name in names
        if (found := QUANTILE.fullmatch(name)) and found[1] == stem
    )  # fmt: skip
    if len(quantiles) > 1:
        middle = next((name for share, name in quantiles if share == 50), None)
        return Picture(metric, quantiles[0][1], quantiles[-1][1], middle)
    low, high = f"{stem}_min", f"{stem}_max"
    if metric.endswith("_mean") and low in names and high in names:
        return Picture(metric, low, high)
    return Picture(metric)
