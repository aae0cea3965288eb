"""Count what a kernel executes, from its disassembly (stub_gpu.Code.sass).

Nothing is run. Of the paths after a branch, the one counted is that with more accesses of 128 bits,
or else more bytes, or else more instructions: that of a whole block rather than of a partial one,
with work rather than without. Subroutines (64-bit division) are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple


class Counts(NamedTuple):
    """Counts of one thread; compared in the order of the fields."""

    wide: int = 0
    """Loads and stores of 128 bits in global memory; LDGSTS loads into shared memory."""
    bytes: int = 0
    """Bytes of all loads and stores in global memory."""
    instructions: int = 0
    special: int = 0
    """Instructions of the special function unit (MUFU): 2^x, logarithm, reciprocal, root."""

    def plus(self, other: Counts, times: int = 1) -> Counts:
        return Counts(*(a + times * b for a, b in zip(self, other, strict=True)))


class Executed(NamedTuple):
    program: Counts
    """Counts from the entry to the exit, with one turn of every loop."""
    loops: tuple[Counts, ...]
    """Counts of a turn of each loop that streams: it holds no other loop and has accesses of 128
    bits, or any accesses where the whole program has none of 128."""

    def in_all(self, turns: int) -> Counts:
        """Return the counts when every loop that streams takes ``turns`` turns."""
        total = self.program
        for loop in self.loops:
            total = total.plus(loop, turns - 1)
        return total


class _Block(NamedTuple):
    counts: Counts
    successors: tuple[int, ...]


def executed(sass: list[str]) -> Executed:
    blocks = list(_blocks(sass))
    # Blocks lie in order: a branch that does not go forward closes a loop.
    back = [(to, at) for at, block in enumerate(blocks) for to in block.successors if to <= at]
    innermost = [
        (first, last)
        for first, last in back
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in back)
    ]
    program = _heaviest(blocks, 0, None)
    loops = [_heaviest(blocks, first, last) for first, last in innermost]
    return Executed(
        program, tuple(loop for loop in loops if (loop.wide if program.wide else loop.bytes))
    )


def _heaviest(blocks: list[_Block], first: int, last: int | None) -> Counts:
    """Return the counts of the path with the most, from block ``first`` to ``last`` or an exit."""

    @cache
    def onward(at: int) -> Counts | None:
        block = blocks[at]
        if at == last or (last is None and not block.successors):
            return block.counts
        ways = [onward(to) for to in block.successors if to > at]
        reaching = [way for way in ways if way is not None]
        return block.counts.plus(max(reaching)) if reaching else None

    return onward(first) or Counts()


def _blocks(sass: list[str]) -> Iterator[_Block]:
    """Yield the blocks of the kernel itself; subroutines and padding come after it."""
    end = next((i for i, line in enumerate(sass) if line.startswith("$")), len(sass))
    groups: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in sass[:end]:
        if line.endswith(":"):
            if groups[-1]:
                groups.append([])
            labels[line[:-1]] = len(groups) - 1
        else:
            groups[-1].append(line)
            if _target(line) or _opcode(line) == "EXIT":
                groups.append([])
    for number, group in enumerate(groups):
        last = group[-1] if group else ""
        target = _target(last)
        conditional = re.match(r"@|BRA\S* !?U?P\d", last)
        successors = []
        if number + 1 < len(groups) and (conditional or not (target or _opcode(last) == "EXIT")):
            successors.append(number + 1)
        if target:
            successors.append(labels[target])
        yield _Block(_count(group), tuple(successors))


def _target(line: str) -> str | None:
    """Return the label that a line jumps to. A call of a label in the kernel does not return."""
    found = re.search(r"`\((\.L\S+?)\)", line)
    return found[1] if found and _opcode(line) in ("BRA", "CALL") else None


def _count(lines: list[str]) -> Counts:
    widths = [_width(line) for line in lines if _opcode(line) in ("LDG", "LDGSTS", "STG")]
    special = sum(_opcode(line) == "MUFU" for line in lines)
    return Counts(sum(width >= 16 for width in widths), sum(widths), len(lines), special)


def _width(access: str) -> int:
    """Return the bytes that a load or store moves."""
    bits = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    modifiers = _instruction(access).split(".")
    return next((bits[name] for name in modifiers if name in bits), 32) // 8


def _instruction(line: str) -> str:
    """Return the instruction of a line, without predicate and operands."""
    return re.sub(r"^@!?\w+ ", "", line).partition(" ")[0].rstrip(";")


def _opcode(line: str) -> str:
    """Return the opcode of a line. A divergent branch, which is not taken, is BRA.DIV."""
    name = _instruction(line)
    return name if name == "BRA.DIV" else name.partition(".")[0]
