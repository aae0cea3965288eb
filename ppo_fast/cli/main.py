"""The command line: ``ppo-fast train``, ``reward``, ``demo``, ``env`` and others."""

from __future__ import annotations

import difflib
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from io import StringIO
from typing import Annotated, Any

import tyro
from rich.console import Console

from ppo_fast.cli.config_file import config_defaults
from ppo_fast.cli.demo import Demo
from ppo_fast.cli.doctor import Doctor
from ppo_fast.cli.env import Env
from ppo_fast.cli.plan import Plan
from ppo_fast.cli.report import Report
from ppo_fast.cli.reward import Reward
from ppo_fast.cli.train import Train
from ppo_fast.cli.watch import Watch
from ppo_fast.config import PPOConfig
from ppo_fast.rewards.fit.settings import RewardModelConfig
from ppo_fast.runs.plain_text import visible

Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Reward, tyro.conf.subcommand("reward")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Env, tyro.conf.subcommand("env")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Watch, tyro.conf.subcommand("watch")]
)
COMMANDS = ("train", "reward", "demo", "env", "doctor", "plan", "report", "watch")
PARTS = (Train, Reward, Demo, Env, Doctor, Plan, Report, Watch, PPOConfig, RewardModelConfig)
FLAGS = {item.name for part in PARTS for item in fields(part)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``ppo-fast``. On bad input, print one line on stderr and exit with status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # where it is installed, it says on some CPUs, asked or not, that a faster kernel is to be had
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # texts may hold what the terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")
    try:
        # no markup: of the texts printed, few are ours
        parse(arguments).run(Output(markup=False, emoji=False))
    except KeyboardInterrupt as stopped:
        number = getattr(stopped, "number", signal.SIGINT)
        line = "ppo-fast: stopped at once; --resume goes on from the newest checkpoint, if any"
        print(line, file=sys.stderr)
        raise SystemExit(128 + number) from stopped
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("PPO_FAST_TRACEBACK"):
            raise
        print(f"ppo-fast: {_line(error)}\n(PPO_FAST_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(2) from error


class Output(Console):
    """Console of the commands. If its reader goes away (``| head``), the command goes on."""

    def on_broken_pipe(self) -> None:
        """Write no more."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(arguments: list[str]) -> Train | Reward | Demo | Env | Doctor | Plan | Report | Watch:
    """Parse the arguments to a command, with the defaults of its ``--config`` file, if any.

    Raises:
        ValueError: no such command, or settings that PPOConfig refuses.
    """
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise ValueError(f"no command {arguments[0]!r}; {hint}")
    command: Any = Command
    options: dict[str, Any] = {"prog": "ppo-fast", "description": __doc__}
    default = config_defaults(arguments)
    if default is not None:
        command, arguments = Train, arguments[1:]
        options = {"prog": "ppo-fast train", "default": default}
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return tyro.cli(command, args=arguments, **options)
    except SystemExit as ended:
        if (refused := _raised_in_package(ended)) is not None:
            raise refused from None
    return tyro.cli(command, args=arguments, **options)  # again: it prints help, or what is wrong


def _raised_in_package(ended: SystemExit) -> ValueError | None:
    """Return the error of a check of ours behind tyro's exit; None if there is none.

    tyro names neither the flag nor the command in its report of such an error.
    """
    error: BaseException | None = ended
    while error is not None:
        frames = [
            frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)
        ]
        if isinstance(error, ValueError) and frames and frames[-1].startswith("ppo_fast."):
            return error
        error = error.__context__
    return None


def _line(error: BaseException) -> str:
    """Return an error's message in one line; a setting that it begins with is named as a flag."""
    message = " ".join(visible(str(error)).split()) or type(error).__name__
    name = re.match(r"\w+(?=[:=])", message)
    if name and name[0] in FLAGS:
        return f"--{name[0].replace('_', '-')}{message[name.end() :]}"
    return message
