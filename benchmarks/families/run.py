"""Run the cases, each in a process of its own, and write docs/families.md.

``python -m families.run`` runs all of them; with names of types, those and their variants, or with
names of cases, which prints the page and writes nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from families.cases import CASES
from families.checks import CHECKS, MAX_LENGTH, PROMPTS, TOLERANCE, TOLERANCE_BF16
from families.configs import LAYERS, TYPES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "families.md"
AT_A_TIME = 2
SECONDS = 120
STATES = {  # of a case, by what is said of it
    "right": "all right",
    "right but": "right, but for what is refused",
    "refused": "refused with a reason: no step is made",
    "fails": "fails: an error that is not ours",
    "wrong": "wrong: a number is not the truth's",
    "no decoder": "no decoder by itself",
    "not built": "not built",
}


def main() -> None:
    cases = chosen(sys.argv[1:])
    start = time.perf_counter()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        found = []
        for number, one in enumerate(pool.map(run, cases), 1):
            print(f"[{number}/{len(cases)}] {said(one)}", flush=True)
            found.append(one)
    print(f"{len(cases)} cases in {(time.perf_counter() - start) / 60:.1f} minutes")
    if len(sys.argv) > 1:
        print("\n" + page(found))
    else:
        PAGE.write_text(page(found))
        print(f"wrote {PAGE.relative_to(ROOT)}")


def chosen(names: list[str]) -> list[str]:
    """Return the cases of these names; a type's name brings its variants."""
    if unknown := [name for name in names if name not in CASES]:
        sys.exit(
            f"ONLY: there is no case {', '.join(unknown)}; benchmarks/families/cases.py and "
            "docs/families.md have their names"
        )
    return [name for name, case in CASES.items() if not names or {name, case.model_type} & {*names}]


def run(name: str) -> dict[str, Any]:
    """Run a case in a process of its own."""
    command = [sys.executable, "-m", "families.case", name]
    # what a model would load or look up on the hub is not tested here
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=env, timeout=SECONDS, capture_output=True, text=True, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return crashed(name, f"the case took over {SECONDS} seconds")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return crashed(name, f"its process ended with {done.returncode}: {last[:300]}")
    return json.loads(lines[-1]) | {"seconds": time.perf_counter() - start}


def crashed(name: str, why: str) -> dict[str, Any]:
    """Return what is found of a case whose process gave no result."""
    return {
        "name": name,
        "model_class": "",
        "not_built": None,
        "not_alone": None,
        "later": None,
        "head": None,
        "passes": None,
        "decoding": None,
        "results": {check: ["fails", why, None] for check in CHECKS},
    }


def state(found: dict[str, Any]) -> str:
    """Return a case's state, one of STATES."""
    if found["not_built"]:
        return "not built"
    if found["not_alone"]:
        return "no decoder"
    outcomes = {check: outcome for check, (outcome, _, _) in found["results"].items()}
    if outcomes["step"] == "refused":  # so that nothing is trained
        return "refused"
    for worst in ("wrong", "fails"):
        if worst in outcomes.values():
            return worst
    return "right but" if "refused" in outcomes.values() else "right"


def said(found: dict[str, Any]) -> str:
    """Return a line about a case, and a line about each check that is not right."""
    lines = [f"{found['name']}: {state(found)} ({found.get('seconds', 0):.0f} s)"]
    reasons: dict[str, list[str]] = {}
    for check, (outcome, text, number) in found["results"].items():
        if outcome not in ("right", "not run"):
            figure = "" if number is None else f" {number:.1e}"
            reasons.setdefault(f"{outcome}: {text}", []).append(check + figure)
    lines += [f"    {', '.join(checks)}: {reason}" for reason, checks in reasons.items()]
    lines += [f"    {found[key]}" for key in ("not_built", "not_alone") if found[key]]
    return "\n".join(lines)


# The page


class Notes:
    """Reasons, numbered in the order in which they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, text: str, found: dict[str, Any]) -> str:
        """Return a reason's number, in brackets. What differs from case to case is left out."""
        if not text:
            return ""
        names = ["PeftModelForCausalLM", *filter(None, [found["model_class"]])]
        text = re.sub(rf"\b({'|'.join(names)})\b", "the model", text)
        text = re.sub(r"\d\.\d+e[+-]\d\d|\b0\.\d+(?= in the mean)", "x", text)
        text = re.sub(r"the gradient of \S+", "a gradient", text)
        text = re.sub(r"model_type='\w+'", "model_type=...", text)
        text = re.sub(r"\{'[^{}]*'\}", "{...}", text)  # a set, in any order
        return f" [{self.numbers.setdefault(text, len(self.numbers) + 1)}]"


def page(results: list[dict[str, Any]]) -> str:
    """Return docs/families.md."""
    notes = Notes()
    rows = [row(found, notes) for found in results]
    counts = Counter(map(state, results))
    columns = ["case", "head, passes, decoding", *CHECKS]
    lines = [
        *introduction(results),
        "",
        *(f"- {STATES[name]}: {counts[name]}" for name in STATES if counts[name]),
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *rows,
        "",
        "## Reasons",
        "",
        *(f"{number}. {text}" for text, number in notes.numbers.items()),
    ]
    return "\n".join(lines) + "\n"


def introduction(results: list[dict[str, Any]]) -> Iterable[str]:
    """Return what stands before the table."""
    worst = {
        check: max((r["results"][check][2] for r in results if ticked(r, check)), default=None)
        for check in CHECKS
    }
    figures = ", ".join(f"{check} {number:.0e}" for check, number in worst.items() if number)
    return [
        "# Families of models",
        "",
        "Written by `make families`. It builds a tiny random model of every type in transformers' "
        f"`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` ({len(TYPES)} types) and of some variants, "
        f"{len(CASES)} cases in all, and trains each with `PPOTrainer` on the CPU.",
        "",
        f"transformers {version('transformers')}, torch {version('torch').split('+')[0]}, peft "
        f"{version('peft')}.",
        "",
        f"Models have {LAYERS} layers or so and a hidden size of 64. {len(PROMPTS)} prompts of 1 "
        f"to 14 tokens get responses of up to {MAX_LENGTH} tokens, decoded in two slots; windows "
        "of attention are shorter than that. (Cases whose names end in `_short` have rows of at "
        "most 12 tokens.) The truth is the plain model in float64, one row at a time, without "
        "padding or cache.",
        "",
        "- head, passes, decoding: whether log-probs come from the hidden states and the LM head "
        "(`fused`) or from all logits (`ordinary`); whether passes over whole sequences have no "
        "padding, and each prompt once (`packed`); how many layers are fused in decoding; `own "
        "cache`: prompts of equal length are decoded together, with the model's cache; `no cache`: "
        "every step computes all tokens",
        f"- rollout: the log-probs that decoding recorded; right if they are within {TOLERANCE} of "
        "the truth",
        "- log-probs: those that the update computes; two of the prompts have two responses",
        f"- gradients: of a weighted sum of log-probs, each weight's, within {TOLERANCE} of it",
        f"- step: a step with a value head; the first minibatch's log-ratios are below {TOLERANCE}",
        "- trunk: a step with `num_layers_unfrozen=1`, which leaves the trunk as it was, and a "
        "rollout after it",
        "- LoRA: a step that changes nothing but adapters, and a rollout after it",
        f"- bf16: a step with `compute_dtype=\"bfloat16\"`; log-ratios below {TOLERANCE_BF16}",
        "- save: the saved policy gives equal logits in transformers, and a checkpoint restores a "
        "new trainer",
        "",
        "✓ is right, `refused` an error of ours before any training, `fails` any other error, "
        "`wrong` a number that is not the truth's; numbers in brackets lead to the reasons below. "
        f"The largest differences under a ✓: {figures}.",
    ]  # fmt: skip


def ticked(found: dict[str, Any], check: str) -> bool:
    """Return whether a check is right and took a difference."""
    outcome, _, number = found["results"].get(check, ("not run", "", None))
    return outcome == "right" and number is not None


def row(found: dict[str, Any], notes: Notes) -> str:
    """Return a case's row of the table."""
    name = found["name"]
    if found["not_built"]:
        return f"| {name} | not built{notes.mark(found['not_built'], found)} |{' |' * len(CHECKS)}"
    first = path_cell(found, notes)
    if found["not_alone"]:
        first = f"no decoder{notes.mark(found['not_alone'], found)}"
    elif found["later"]:
        why = "logits of a token change when other tokens follow it"
        first += notes.mark(why, found)
    cells = [cell(*found["results"][check], found, notes) for check in CHECKS]
    return f"| {name} | {first} | {' | '.join(cells)} |"


def path_cell(found: dict[str, Any], notes: Notes) -> str:
    head, passes, decoding = found["head"], found["passes"], found["decoding"]
    if head is None:
        return "-"
    first = "fused" if head["fused"] else f"ordinary{notes.mark(head['why_not'], found)}"
    second = f"{passes['name']}{notes.mark(passes['why_not'] or '', found)}"
    return f"{first}, {second}, {decoding['name']}{notes.mark(decoding['why_not'] or '', found)}"


def cell(outcome: str, text: str, number: float | None, found: dict[str, Any], notes: Notes) -> str:
    if outcome == "not run":
        return "-"
    mark = notes.mark(text, found)
    if outcome == "right":
        return f"✓{mark}"
    return f"{outcome}{'' if number is None else f' {number:.0e}'}{mark}"


if __name__ == "__main__":
    main()
