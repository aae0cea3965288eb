"""Write constraints.txt to stdout from reports of ``pip install --dry-run``; see `make lock`."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
HEADER = """\
# What was tested: the exact version of everything that `make install` installs on every Python.
# Written by `make lock` under Python {python}, the lowest that pyproject.toml allows: what runs
# there has wheels for the later ones too. For users, pyproject.toml has ranges.
"""


def main(reports: list[str]) -> None:
    project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
    lowest = project["requires-python"].removeprefix(">=")
    versions = {}
    for path in reports:
        report = json.loads(Path(path).read_text("utf-8"))
        if report["environment"]["python_version"] != lowest:
            sys.exit(f"make lock needs Python {lowest}: make lock PYTHON=python{lowest}")
        for package in report["install"]:
            name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
            # Without the local part: which build of it an index offers is its own choice.
            versions[name] = package["metadata"]["version"].partition("+")[0]
    del versions[project["name"].replace("_", "-")]
    print(HEADER.format(python=lowest), end="")
    for name in sorted(versions):
        print(f"{name}=={versions[name]}")


if __name__ == "__main__":
    main(sys.argv[1:])
