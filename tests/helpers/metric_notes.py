"""The table of docs/metrics.md, as the report of a run reads it; run as a script, this module
updates ppo_fast/report/metrics.json."""

from __future__ import annotations

import html
import itertools
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "metrics.md"
NOTES = ROOT / "ppo_fast" / "report" / "metrics.json"


def notes() -> list[dict]:
    """Return each row's names, meaning and "look closer when", without Markdown."""
    table = re.search(r"^\|[- |]+\|\n((?:\|.*\n)+)", DOCUMENT.read_text("utf-8"), re.MULTILINE)
    assert table is not None
    found = []
    for row in table[1].splitlines():
        names, meaning, look = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1])
        found.append({"names": _names(names), "meaning": _plain(meaning), "look": _plain(look)})
    for above, note in itertools.pairwise(found):  # on a page of their own they have no "above"
        look = note["look"].replace("; for 0 see below", "")
        if look.endswith(": as above"):
            look = look.removesuffix("as above") + above["look"].rpartition(": ")[2]
        note["look"] = above["look"] if look == "as above" else look
        note["meaning"] = (
            note["meaning"]
            .removesuffix("; see below")
            .replace("the same of", f"as {above['names'][0]}, of")
        )
    return found


def _names(cell: str) -> list[str]:
    """Return the names of a row; "/b" after "x/a" stands for "x/b"."""
    parts = [part.strip() for part in _plain(cell).split(",")]
    stem = parts[0].rpartition("/")[0]
    return [stem + part if part.startswith("/") else part for part in parts]


def _plain(cell: str) -> str:
    return html.unescape(cell.replace(r"\|", "|").replace("`", ""))


def text() -> str:
    rows = [json.dumps(note, ensure_ascii=False) for note in notes()]
    return "[\n" + ",\n".join(rows) + "\n]\n"


if __name__ == "__main__":
    NOTES.write_text(text(), "utf-8")
