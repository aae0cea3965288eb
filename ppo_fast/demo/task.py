"""The demo's task: continue the opening line of a review, and be positive about it."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from os import PathLike
from typing import Any

HELD_OUT = 32
INSTALL_DEMO = 'pip install "ppo_fast[demo]"'
REWARD_COLOR, KL_COLOR = "#1f6feb", "#bc4c00"


def load_prompts() -> tuple[list[str], list[str]]:
    """Return the opening lines to train on (64) and those held out (32), in the order of the file.

    The file is ``ppo_fast/demo/reviews.txt``: one prompt a line, ``#`` starts a comment line.
    """
    text = (importlib.resources.files("ppo_fast.demo") / "reviews.txt").read_text("utf-8")
    prompts = [line for line in text.splitlines() if line and not line.startswith("#")]
    return prompts[:-HELD_OUT], prompts[-HELD_OUT:]


def positivity(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Score how positive each completion is by itself, in [-1, 1]: VADER's compound score.

    VADER is a lexicon with rules (Hutto and Gilbert, ICWSM 2014), which takes microseconds. The
    prompts are not scored: the model did not write them. An empty completion scores 0.

    Raises:
        ModuleNotFoundError: vaderSentiment is not installed; the message says how to install it.
    """
    scorer = _analyzer()
    return [float(scorer.polarity_scores(text)["compound"]) for text in completions]


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the demo's reward needs vaderSentiment, which is not installed: {INSTALL_DEMO}"
        ) from error
    return SentimentIntensityAnalyzer()


def distinct_2(completions: Sequence[str]) -> float:
    """Return the share of distinct word bigrams among all of the completions together, in [0, 1].

    It is low when the texts repeat themselves or each other (distinct-2 of Li et al., arXiv
    1510.03055, section 5, which divides by words instead). It falls as the amount of text grows:
    compare equal amounts only. Words are lowercased, without punctuation; a bigram never spans two
    completions. Without any bigram it is 0.0.
    """
    bigrams: list[tuple[str, str]] = []
    for text in completions:
        words = re.findall(r"\w+(?:['\u2019]\w+)*", text.lower())
        bigrams += pairwise(words)
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def plot_curves(
    path: str | PathLike[str],
    steps: Sequence[int],
    rewards: Sequence[float],
    kls: Sequence[float],
) -> None:
    """Write a PNG of the mean reward and of the KL to the start (nats per sequence) over the steps.

    Raises:
        ValueError: the three sequences differ in length or are empty.
        ModuleNotFoundError: matplotlib is not installed; the message says how to install it.
    """
    if not len(steps) == len(rewards) == len(kls) > 0:
        raise ValueError(
            "plot_curves: steps, rewards and kls must have one length, at least 1; "
            f"got {len(steps)}, {len(rewards)} and {len(kls)}"
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the demo's plot needs matplotlib, which is not installed: {INSTALL_DEMO}"
        ) from error

    # A Figure of its own, not pyplot: no window system and no global state.
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    curves = (
        ("Mean reward", "positivity of the continuation", rewards, REWARD_COLOR),
        ("KL to the start", "nats per sequence", kls, KL_COLOR),
    )
    for axes, (title, unit, values, color) in zip(panels, curves, strict=True):
        axes.plot(steps, values, color=color, linewidth=2, marker="o", markersize=3.5)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("PPO step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.annotate(
            f"{values[-1]:.2f}",
            (steps[-1], values[-1]),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="bold",
            annotation_clip=False,
        )
    panels[1].axhline(0.0, color="0.6", linewidth=0.8, zorder=1)
    figure.savefig(path, dpi=150, format="png")
