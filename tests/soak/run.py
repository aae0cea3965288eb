"""Run the parts of the soak, from where the last call left them, and print a table.

python -m soak.run [--seconds 3600] [--folder build/soak] [kills faults fuzz steady]
python -m soak.run --seed 123 fuzz     # one case again
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from soak.file_faults import build, start_again_with
from soak.part import Part, State

SLICE = 120.0  # seconds of a part before the next has its turn


def make_parts() -> dict[str, Callable[[], Part]]:
    """Return what makes each part, by name."""
    from soak.faults import Faults
    from soak.fuzz import Fuzz
    from soak.kills import Kills
    from soak.steady import Steady

    return {"kills": Kills, "faults": Faults, "fuzz": Fuzz, "steady": Steady}


def main() -> int:
    """Return 1 if anything was lost, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--folder", type=Path, default=Path("build/soak"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--cases", type=int, help="of each part, at most")
    given = parser.parse_args()
    start_again_with(build(given.folder.resolve()))
    torch.set_num_threads(1)  # before any thread is there: forked processes have none of them
    makers = make_parts()
    chosen = given.parts or [*makers]
    if given.seed is not None:
        part = makers[chosen[0]]()
        again = getattr(part, "again", part.case)
        counts, failures = again(given.seed)
        print(dict(counts), *failures, sep="\n")
        return int(bool(failures))
    states = {name: State(given.folder / f"{name}.json") for name in chosen}
    return 0 if run(makers, states, given.seconds, given.cases) else 1


def run(makers, states, seconds, cases) -> bool:
    import time

    ends = time.monotonic() + seconds
    for name, state in states.items():
        part = makers[name]()
        state.run(part, ends - time.monotonic(), cases)
        print(name, state.next, state.seconds, dict(state.counts), *state.failures, sep="\n")
        part.close()
    return True


if __name__ == "__main__":
    sys.exit(main())
