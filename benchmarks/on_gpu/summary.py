"""Print the findings of a run, a short line each, and the tests that failed.

python benchmarks/on_gpu/summary.py RESULTS.jsonl [JUNIT.xml]
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {short(v)}" for k, v in value.items()) + "}"
    return str(value)[:160]


def lines(results: Path, junit: Path | None) -> list[str]:
    found = []
    for text in results.read_text().splitlines() if results.exists() else []:
        finding = json.loads(text)
        stage = finding.pop("stage")
        finding.pop("at", None)
        values = (f"{name} {short(value)}" for name, value in finding.items() if value is not None)
        found.append(f"{stage}: {', '.join(values)}")
    if junit is not None and junit.exists():
        found += tests(junit)
    return found


def tests(junit: Path) -> list[str]:
    """Describe the tests that ran, and each that failed."""
    cases, failures = read_tests(junit)
    failed = sum(map(len, failures.values()))
    named = [f"  {name} x{len(whys)}: {whys[0]}" for name, whys in failures.items()]
    return [f"tests: {cases}, failed {failed}", *named]


def read_tests(junit: Path) -> tuple[int, dict[str, list[str]]]:
    """Return the number of tests, and why tests failed, by name without parameters."""
    cases = list(ET.parse(junit).iter("testcase"))
    failures: dict[str, list[str]] = {}
    for case in cases:
        for kind in ("failure", "error"):
            if (why := case.find(kind)) is not None:
                name = f"{case.get('classname', '')}::{case.get('name', '').split('[')[0]}"
                message = (why.get("message") or "").split("\n")[0]
                failures.setdefault(name, []).append(message[:140])
    return len(cases), failures


if __name__ == "__main__":
    results, *junit = map(Path, sys.argv[1:])
    print("\n".join(lines(results, junit[0] if junit else None)))
