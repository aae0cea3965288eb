"""Where errors in users' code arose."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

LIBRARY, PACKAGE = os.path.dirname(os.__file__), str(Path(__file__).parent)


def place_of_error(error: BaseException) -> str:
    """Return the file and line of the user's code in which an error arose, to be appended."""
    others = (LIBRARY, PACKAGE, "<frozen")
    frames = traceback.extract_tb(error.__traceback__)
    names = [(f.filename, f.lineno) for f in frames if not f.filename.startswith(others)]
    own = [(name, line) for name, line in names if "site-packages" not in name]
    return f" ({own[-1][0]}:{own[-1][1]})" if own else ""
