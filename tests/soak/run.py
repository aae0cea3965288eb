"""Run the parts of the soak from where the last call left them, and print a table.

python -m soak.run [--seconds 3600] [kills faults fuzz steady]
python -m soak.run --seed 123 fuzz     one case again
python -m soak.run --small             what the tests run of it: the same few cases
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from soak.file_faults import build, start_again_with
from soak.part import Part, State

# Seconds that a part runs before the next has its turn.
TURN = 120.0
# Cases of each part, and steps of a long run, in the tests.
SMALL = {"kills": 4, "faults": 10, "fuzz": 1, "steady": 1}
SMALL_STEPS = 60


def makers(steps: int | None = None) -> dict[str, Callable[[], Part]]:
    """Return what makes each part, by name. ``steps`` are those of a long run; None: as usual."""
    from soak.faults import Faults
    from soak.fuzz import Fuzz
    from soak.kills import Kills
    from soak.steady import STEPS, Steady

    steady = partial(Steady, steps or STEPS)
    return {"kills": Kills, "faults": Faults, "fuzz": Fuzz, "steady": steady}


def main() -> int:
    """Return 1 if anything was lost in these parts so far, else 0."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("parts", nargs="*", help="kills, faults, fuzz, steady; none: all")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of this call")
    parser.add_argument("--small", action="store_true", help="a few cases of each part")
    parser.add_argument("--folder", type=Path, default=Path("build/soak"))
    parser.add_argument("--seed", type=int, help="run this one case of the part again")
    given = parser.parse_args()
    start_again_with(build(given.folder.resolve()))

    import torch

    torch.set_num_threads(1)  # before there is any thread: a forked process would lack it
    all_parts = makers(SMALL_STEPS if given.small else None)
    chosen = {name: all_parts[name] for name in given.parts or all_parts}
    if given.seed is not None:
        return run_again(next(iter(chosen.values()))(), given.seed)
    states = {name: State(given.folder / f"{name}.json") for name in chosen}
    run(chosen, states, math.inf if given.small else given.seconds, small=given.small)
    show(states)
    return int(any(state.failures for state in states.values()))


def run_again(part: Part, seed: int) -> int:
    """Run one case, and print what it finds; return 1 if anything was lost, else 0."""
    counts, failures = part.again(seed)
    print(dict(counts), *failures, sep="\n")
    part.close()
    return int(bool(failures))


def run(
    chosen: dict[str, Callable[[], Part]],
    states: dict[str, State],
    seconds: float,
    *,
    small: bool,
) -> None:
    """Run the parts in turns, for so long or until all reach their targets."""
    ends = time.monotonic() + seconds
    with ExitStack() as stack:
        parts = {name: stack.enter_context(closing(make())) for name, make in chosen.items()}
        for name, part in parts.items():
            states[name].try_again(part)
        left = list(parts)
        while left and (time_left := ends - time.monotonic()) > 0:
            name = left.pop(0)
            turn = math.inf if small else min(TURN, time_left)
            done = states[name].run(parts[name], turn, SMALL[name] if small else None)
            if not done and not small:
                left.append(name)


def show(states: dict[str, State]) -> None:
    """Print what each part did so far, and every failure."""
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False)
    table = Table("part", "of its target", "minutes", "what", "failures")
    for name, state in states.items():
        what = ", ".join(f"{count} {kind}" for kind, count in sorted(state.counts.items()))
        progress = f"{state.counts[state.counted]} of {state.target}"
        table.add_row(name, progress, f"{state.seconds / 60:.0f}", what, str(len(state.failures)))
    console.print(table)
    for name, state in states.items():
        for failure in state.failures:
            console.print(f"{name}, case {failure['case']}: {failure['what']}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
