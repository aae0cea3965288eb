"""Run one case: train a tiny model, and compare each number with the truth.

``python -m families.case NAME`` prints one line of JSON.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from families.cases import CASES
from families.checks import CHECKS, Result, Subject, check_bf16, is_refusal
from families.configs import Case
from families.truth import in_float64, plain_logits
from transformers import logging as transformers_logging

from ppo_fast.rollout.speedups.fast_paths import fast_paths

SECONDS = 100


class Overtime(BaseException):
    """Raised when a case has taken SECONDS; no check catches it."""


def attempt(check: Callable[[Subject], Result], subject: Subject) -> Result:
    """Run a check; an error and a warning of unreliable training are results too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = check(subject)
        except Exception as error:
            return Result("refused" if is_refusal(error) else "fails", described(error))
    said = [str(w.message) for w in caught if "Decoding and the update" in str(w.message)]
    if said and result.outcome == "right":
        return result._replace(outcome="right" if check is check_bf16 else "wrong", text=said[0])
    return result


def described(error: Exception) -> str:
    """Return the error's message in one line; with its type and place if it is not ours."""
    text = " ".join(str(error).split())
    if is_refusal(error):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "/".join(Path(frame.filename).parts[-2:])
    return f"{type(error).__name__}: {text[:300]} ({place}:{frame.lineno})"


# The case


def run_case(case: Case) -> dict[str, Any]:
    """Return what was found about a case, as JSON has it.

    name, model_class: the case and its class.
    not_built: why there is no such model, or None.
    not_alone: why it cannot be called with tokens alone, or None.
    later: the largest difference that later tokens make to logits, or None where they make none.
    head, passes, decoding: the fast paths, by ``paths``.
    results: by check, as lists.
    """
    found: dict[str, Any] = {"name": case.name, "model_class": "", "not_built": None}
    found |= {
        "not_alone": None,
        "later": None,
        "head": None,
        "passes": None,
        "decoding": None,
        "results": {},
    }
    try:
        subject = Subject(case)
    except Exception as error:
        return found | {"not_built": described(error)}
    found["model_class"] = type(subject.model).__name__
    try:
        found["later"] = effect_of_later_tokens(subject)
    except Exception as error:
        found["not_alone"] = described(error)
    over: str | None = None
    for name, check in CHECKS.items():
        try:
            found["results"][name] = Result("not run", over) if over else attempt(check, subject)
        except Overtime:
            over = f"the case took over {SECONDS} seconds"
            found["results"][name] = Result("fails", over)
    with suppress(Exception):  # if there is no trainer, the results say why
        found |= paths(subject)
    return found


def effect_of_later_tokens(subject: Subject) -> float | None:
    """Return how much logits change when tokens follow, relative to the largest; None if not."""
    model, ids = in_float64(subject.model), max(subject.tokens.sequences(), key=len)
    with torch.no_grad():
        n = len(ids) // 3
        whole, start = plain_logits(model, ids)[:n], plain_logits(model, ids[:n])
    difference = ((whole - start).abs().max() / start.abs().max()).item()
    return None if difference < 1e-5 else difference


def paths(subject: Subject) -> dict[str, Any]:
    """Return how log-probs and responses are computed, and why not faster."""
    policy = subject.trainer().policy
    head = {"fused": policy.fused, "why_not": None if policy.fused else policy.reason}
    by_name = {path.name: path for path in fast_paths(policy)}
    if layers := next((path for name, path in by_name.items() if "layers" in name), None):
        number = re.match(r"\d+ of \d+", layers.name)
        name, why_not = f"{number.group() if number else 'no'} layers", layers.why_not
    elif "cache" in by_name:
        name, why_not = "no cache", by_name["cache"].why_not
    else:
        name, why_not = "own cache", by_name["slots in one KV cache"].why_not
    why_padded = policy.passes.why_padded
    passes = {"name": "padded" if why_padded else "packed", "why_not": why_padded}
    return {"head": head, "passes": passes, "decoding": {"name": name, "why_not": why_not}}


def _overtime(*_: Any) -> None:
    raise Overtime


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _overtime)
    signal.alarm(SECONDS)
    print(json.dumps(run_case(CASES[sys.argv[1]])))


if __name__ == "__main__":
    main()
