"""Fuzz settings, prompts, rewards and arguments: each outcome is a result or an error of ours.

The cases come from a seed each, without a library that shrinks them: they must be the same when a
part of them is run later, and a case has few things in it that are not as usual.
"""

from __future__ import annotations

import copy
import logging
import random
import re
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import count_letters

import ppo_fast
from ppo_fast import PPO, PPOConfig, ValueModel
from soak import fuzz_inputs, fuzz_settings
from soak.part import Found, work_folder
from soak.worker import Report, Worker, import_all_of

PACKAGE = str(Path(ppo_fast.__file__).parent)
BATCH = 50  # cases in one process
SECONDS = 20  # after which a case hangs
ALLOWED = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError)
ARGUMENTS = (
    *fuzz_settings.NAMES,
    *("prompts", "reward", "reward_model", "num_steps", "batch_size", "checkpoint", "on_step"),
    *("checkpoint_dir", "checkpoint_freq", "keep_last", "max_time", "progress", "value_model"),
)
NAMED = re.compile(r"(?<![a-z_])(" + "|".join(ARGUMENTS) + r")(?![a-z_])")


class Hung(BaseException):
    """Raised in a case that takes too long."""


class Fuzz:
    """Part of the soak: a case of it is BATCH fuzzed ones, in one process."""

    target, counted = 10_000, "cases"

    def __init__(self) -> None:
        self._folder = work_folder("fuzz")
        self._output = self._folder / "output"
        import_all_of(lambda report: _run(range(2), self._folder / "warm", report), self._output)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def case(self, seed: int) -> Found:
        """Run fuzzed cases seed * BATCH to (seed + 1) * BATCH."""
        return self.cases(range(seed * BATCH, (seed + 1) * BATCH))

    def again(self, seed: int) -> Found:
        """Run one fuzzed case."""
        return self.cases(range(seed, seed + 1))

    def cases(self, seeds: range) -> Found:
        """Run fuzzed cases; one that ends its process is a failure, and the next go on."""
        counts: Counter[str] = Counter()
        failures: list[str] = []
        place = self._folder / "place"
        while seeds:
            self._output.unlink(missing_ok=True)
            worker = Worker(partial(_run, seeds, place), self._output)
            ended = worker.wait(len(seeds) * 2.0 + 2 * SECONDS)
            done = [line.split(" ", 2) for line in ended.reports]
            outcomes = Counter(outcome for _, outcome, _ in done if outcome != "failure")
            counts += outcomes + Counter(cases=len(done))
            failures += [f"seed {n}: {what}" for n, outcome, what in done if outcome == "failure"]
            seeds = seeds[len(done) :]
            if seeds:
                failures.append(f"seed {seeds[0]}: ended its process: {ended.status}")
                counts += Counter(cases=1)
                seeds = seeds[1:]
            shutil.rmtree(place, ignore_errors=True)
        for failure in failures:
            print(f"fuzz, {failure}", file=sys.stderr)
        return Found(counts, failures)


def _run(seeds: range, folder: Path, report: Report) -> None:
    """Run cases in this process, and report "seed outcome text" of each."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    models = tiny_model(layers=2, hidden=16), tiny_model(layers=1, hidden=16)
    tokenizer = tiny_tokenizer()

    def end(number: int, frame: Any) -> None:
        raise Hung

    signal.signal(signal.SIGALRM, end)
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir(parents=True)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        outcome, text = run_one(seed, models, tokenizer, place)
        signal.setitimer(signal.ITIMER_REAL, 0)
        report(f"{seed} {outcome} {' '.join(text.split())[:600]}")
        shutil.rmtree(place)


def run_one(seed: int, models: Any, tokenizer: Any, folder: Path) -> tuple[str, str]:
    """Run a case; return "result", "refused", "own" or "failure", and what it was."""
    draw = random.Random(f"fuzz {seed}")
    random.seed(seed)
    torch.manual_seed(seed)
    drawn = {part: draw.random() < 0.5 for part in ("settings", "prompts", "reward", "arguments")}
    settings = fuzz_settings.settings(draw) if drawn["settings"] else {"max_length": 4}
    prompts = fuzz_inputs.prompts(draw) if drawn["prompts"] else ["The film was", "There"]
    reward = fuzz_inputs.reward(draw) if drawn["reward"] else count_letters
    arguments: dict[str, Any] = {"num_steps": 1, "batch_size": 2}
    if drawn["arguments"]:
        arguments = fuzz_settings.arguments(draw, folder, lambda step: None)
    policy, body = copy.deepcopy(models)
    given = f"settings {settings!r:.200} arguments {arguments!r:.150} prompts {prompts!r:.100}"
    try:
        config = PPOConfig(**settings)
        value_model = ValueModel(body, 16) if config.critic == "model" else None
        ppo = PPO(policy, tokenizer, reward, value_model=value_model, config=config, device="cpu")
        ppo.train(prompts, **{"progress": False} | arguments)
    except BaseException as error:
        return _outcome(error, policy, given)
    if not _finite(policy):
        return "failure", f"weights that are not finite; {given}"
    return "result", ""


def _finite(model: Any) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


def _outcome(error: BaseException, policy: Any, given: str) -> tuple[str, str]:
    """Return what an error is: ours, or of the user's code, or a failure."""
    frames = traceback.extract_tb(error.__traceback__)
    last, message = frames[-1], " ".join(f"{error}".split())
    said = f"{type(error).__name__}: {message:.200} ({last.filename}:{last.lineno}); {given}"
    of_user = "fuzz_inputs" in last.filename
    if not _finite(policy):
        return "failure", f"weights that are not finite; {said}"
    if of_user or any("fuzz_inputs" in f.filename for f in _frames_of_causes(error)):
        return "own", said
    if not last.filename.startswith(PACKAGE) or not isinstance(error, ALLOWED):
        own = next((f for f in reversed(frames) if f.filename.startswith(PACKAGE)), last)
        return "failure", f"[{own.filename.removeprefix(PACKAGE)}:{own.lineno}] {said}"
    # an error of numbers names what is not finite, which no argument may be the cause of
    if not isinstance(error, FloatingPointError) and not NAMED.search(message):
        return "failure", f"names no argument: {said}"
    return "refused", said


def _frames_of_causes(error: BaseException) -> list[traceback.FrameSummary]:
    found: list[traceback.FrameSummary] = []
    cause = error.__cause__
    while cause is not None:
        found += traceback.extract_tb(cause.__traceback__)
        cause = cause.__cause__
    return found
