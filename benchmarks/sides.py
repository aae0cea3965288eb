"""Several ways to do the same work, timed in turns: ours first, by pytest-benchmark.

The names of ours start with ppo_fast.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

# The sizes of the suite: the tokens of 16 responses of 32, and the head of SmolLM2-135M.
TOKENS, VOCAB, HIDDEN = 512, 49152, 576
ROWS, STEPS = 64, 512  # responses and their tokens, for ops without a vocabulary

Side = Callable[[], Any]


def take_turns(
    benchmark: Any, work: str, sides: dict[str, Side], *, rounds: int, warm: bool = True
) -> dict[str, float]:
    """Return the median seconds of each side; pytest-benchmark times the first one, which is ours.

    A round runs every side once, so that a slow moment of the machine hits them all. ``warm``: each
    side is called once, untimed, just before its timed call, so that it does not pay for what the
    side before it evicted from the caches, nor for memory that a virtual machine has given back
    since. What a side returns is freed outside its time.
    """
    ours, *others = sides
    times: dict[str, list[float]] = {name: [] for name in others}

    def others_turn() -> None:
        for name in others:
            if warm:
                sides[name]()
            started = time.perf_counter()
            result = sides[name]()
            times[name].append(time.perf_counter() - started)
            del result
        if warm:
            sides[ours]()

    others_turn()  # torch.compile compiles, torch starts its threads
    sides[ours]()
    for name in others:
        times[name].clear()
    benchmark.group = work
    benchmark.pedantic(sides[ours], setup=others_turn, rounds=rounds)
    medians = {ours: benchmark.stats.stats.median}
    medians |= {name: statistics.median(times[name]) for name in others}
    benchmark.extra_info |= {"work": work, "unit": "ms", "rounds": rounds}
    benchmark.extra_info["sides"] = {name: 1e3 * median for name, median in medians.items()}
    return medians


def ratios_to_ours(name: str, sides: dict[str, float]) -> list[str]:
    """Return how many times as much ``name`` takes as each of ours; [] if it is one of ours."""
    if name.startswith("ppo_fast"):
        return []
    ours = [amount for other, amount in sides.items() if other.startswith("ppo_fast")]
    ratios = [sides[name] / amount for amount in ours]
    return [f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2f}x" for ratio in ratios]
