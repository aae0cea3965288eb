"""The comparisons: each is checked, counted and shown in a table at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Largest difference that rounding may make, in units of the dtype's epsilon and of the largest
# number that goes into a sum: sums of up to 100 terms, in any order, each with an exp.
ROUNDING = 8
# verl and OpenRLHF add this to the number of tokens that they divide by.
EPSILON_OF_MEANS = 1e-8


@dataclass
class Line:
    """The comparisons of one function of another library, with one set of options.

    note: what the other does differently by design, and the test pins.
    """

    library: str
    function: str
    ours: str
    options: str
    note: str = ""
    comparisons: int = 0
    largest: dict[torch.dtype, float] = field(default_factory=dict)

    def agree(
        self, ours: Tensor, theirs: Tensor, *, scale: Tensor | float = 0.0, slack: float = 0.0
    ) -> None:
        """Check that two tensors differ by no more than rounding.

        Args:
            ours, theirs: tensors of one shape.
            scale: magnitude of what was summed, where it may be above that of the sum.
            slack: relative difference that is by design, such as that of an epsilon.
        """
        dtype = max(ours.dtype, theirs.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        assert ours.shape == theirs.shape, self
        mine, other = ours.detach().double(), theirs.detach().double()
        size = max(float(other.abs().amax()), float(scale)) if other.numel() else 0.0
        difference = float((mine - other).abs().amax()) if other.numel() else 0.0
        relative = difference / size if size > 0 else difference
        allowed = ROUNDING * torch.finfo(dtype).eps + slack
        assert relative <= allowed, f"{self}\n{ours}\n{theirs}\n{relative:.2e} > {allowed:.2e}"
        self.comparisons += 1
        self.largest[dtype] = max(relative, self.largest.get(dtype, 0.0))

    def differ(self, ours: Tensor, theirs: Tensor, *, by: float = 1e-3) -> None:
        """Check that two tensors differ by more than ``by``, relative to theirs."""
        mine, other = ours.detach().double(), theirs.detach().double()
        assert float((mine - other).abs().amax()) > by * float(other.abs().amax()), self
        self.comparisons += 1


LINES: dict[tuple[str, str, str, str], Line] = {}


def line(library: str, function: str, ours: str, options: str = "", note: str = "") -> Line:
    """Return the line of the table with this heading, a new one at first."""
    heading = (library, function, ours, options)
    if heading not in LINES:
        LINES[heading] = Line(*heading, note)
    return LINES[heading]


def loss_and_gradients_agree(
    where: Line, ours: Iterable[Tensor], theirs: Iterable[Tensor], *, slack: float = 0.0
) -> None:
    """Compare (loss, gradients ...) of both.

    The loss is a sum of terms that may cancel one another; they have about the gradients' sizes,
    but for those of clipped tokens.
    """
    (loss, *gradients), (other, *others) = ours, theirs
    scale = sum((x.detach().abs().sum() for x in others), other.detach().abs())
    where.agree(loss, other, scale=scale, slack=10 * slack)
    for gradient, another in zip(gradients, others, strict=True):
        where.agree(gradient, another, slack=slack)


def table() -> list[str]:
    """Return the lines of a Markdown table of all comparisons, and of a list of differences."""
    rows = [
        "| library | theirs | ours | options | comparisons | float32 | float64 |",
        "|---|---|---|---|---|---|---|",
    ]
    notes: dict[str, int] = {}
    for entry in (entry for _, entry in sorted(LINES.items()) if entry.comparisons):
        if entry.note:
            note = f"- {entry.library}, `{entry.function}`: {entry.note}"
            notes[note] = notes.get(note, 0) + entry.comparisons
            continue
        found = (_number(entry.largest, dtype) for dtype in (torch.float32, torch.float64))
        heading = (entry.library, f"`{entry.function}`", f"`{entry.ours}`", entry.options)
        rows.append("| " + " | ".join((*heading, str(entry.comparisons), *found)) + " |")
    total = sum(entry.comparisons for entry in LINES.values())
    differences = [f"{note} ({count})" for note, count in notes.items()]
    heading = "Different by design; in brackets the comparisons that pin it:"
    return [*rows, "", heading, "", *differences, "", f"{total} comparisons."]


def _number(largest: dict[torch.dtype, float], dtype: torch.dtype) -> str:
    if dtype not in largest:
        return ""
    return f"{largest[dtype]:.0e}" if largest[dtype] > 0 else "0"
