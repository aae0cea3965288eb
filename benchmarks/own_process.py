"""Steps of a side in a process of its own.

What one library sets for its process, as malloc's thresholds, is then not the other's.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

READY = "ready"


class OwnProcess:
    """Makes the side SIDES[work][name] of ``module`` in a new process; ``step`` runs one there.

    Attributes:
        spent: seconds that its steps spent in each of their parts, of a side that counts them.
    """

    def __init__(self, module: str, work: str, name: str) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; import own_process; "
        code += f"own_process.serve({module!r}, {work!r}, {name!r})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.spent: dict[str, float] = {}
        self._wait(name)

    def step(self) -> None:
        """Run a step, and return when it is done."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        self._wait("step")

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()  # it waits, and closes the pipes

    def _wait(self, what: str) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(READY):
                self.spent = json.loads(line.removeprefix(READY))
                return
        raise RuntimeError(f"{what}: the process ended with status {self._process.wait()}")


def serve(module: str, work: str, name: str) -> None:
    """Make a side, and run a step for every line of the standard input."""
    from ppo_fast.demo.smollm2 import load_smollm2

    step = importlib.import_module(module).SIDES[work][name](load_smollm2())
    spent = getattr(step.__self__, "spent", {})
    print(READY, json.dumps(spent), flush=True)
    for _ in sys.stdin:
        step()
        print(READY, json.dumps(spent), flush=True)
