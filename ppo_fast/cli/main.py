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
from dataclasses import dataclass, fields
from io import StringIO
from typing import Annotated, Any, Literal, Union

import tyro
from rich.console import Console

from ppo_fast import __version__
from ppo_fast.cli.config_file import config_defaults
from ppo_fast.cli.demo import Demo
from ppo_fast.cli.doctor import Doctor
from ppo_fast.cli.env import Env
from ppo_fast.cli.flags import check_flags
from ppo_fast.cli.groups import TrainFlags, flags_of, train_of
from ppo_fast.cli.plan import Plan
from ppo_fast.cli.report import Report
from ppo_fast.cli.reward import Reward
from ppo_fast.cli.train import Train
from ppo_fast.cli.watch import Watch
from ppo_fast.config import PPOConfig
from ppo_fast.rewards.fit.settings import RewardModelConfig
from ppo_fast.runs.plain_text import visible

DESCRIPTION = """PPO for language models.

A command's flags: ppo-fast COMMAND --help. The version: ppo-fast --version."""


@dataclass(frozen=True)
class Completion:
    """Print a script that completes commands and flags in a shell."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    """The shell."""

    def run(self, console: Console) -> None:
        """Run the command."""
        arguments = ["--tyro-write-completion", self.shell, "-"]
        try:
            tyro.cli(any_command(brief=True), args=arguments, prog="ppo-fast")
        except AssertionError as error:  # tyro 1.0 has no fish
            raise ValueError(f"completion: {self.shell} needs a newer tyro; upgrade it") from error


COMMANDS: dict[str, type] = {
    "train": TrainFlags,
    "reward": Reward,
    "demo": Demo,
    "env": Env,
    "doctor": Doctor,
    "plan": Plan,
    "report": Report,
    "watch": Watch,
    "completion": Completion,
}


def any_command(*, brief: bool) -> Any:
    """Return a union of all commands; ``brief``: with the first line of each one's docstring."""
    parts = []
    for name, cls in COMMANDS.items():
        line = (cls.__doc__ or "").partition("\n\n")[0] if brief else None
        parts.append(Annotated[cls, tyro.conf.subcommand(name, description=line)])
    return Union[tuple(parts)]  # noqa: UP007


PARTS = (Train, Reward, Demo, Env, Doctor, Plan, Report, Watch, PPOConfig, RewardModelConfig)
FLAGS = {item.name for part in PARTS for item in fields(part)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``ppo-fast``. On bad input, print one line on stderr and exit with status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _set_up_output()
        if arguments == ["--version"]:
            print(f"ppo-fast {__version__}")
            return
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


def _set_up_output() -> None:
    # where it is installed, it says on some CPUs, asked or not, that a faster kernel is to be had
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # texts may hold what the terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")


class Output(Console):
    """Console of the commands. If its reader goes away (``| head``), the command goes on."""

    def on_broken_pipe(self) -> None:
        """Write no more."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(
    arguments: list[str],
) -> Train | Reward | Demo | Env | Doctor | Plan | Report | Watch | Completion:
    """Parse the arguments to a command, with the defaults of its ``--config`` file, if any.

    Raises:
        ValueError: no such command or flag, or settings that PPOConfig refuses.
    """
    name, *rest = arguments or [""]
    if name and not name.startswith("-") and name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise ValueError(f"no command {name!r}; {hint}")
    command = any_command(brief=name not in COMMANDS)
    options: dict[str, Any] = {"prog": "ppo-fast", "description": DESCRIPTION}
    default = config_defaults(arguments)
    if default is not None:
        command, arguments = TrainFlags, rest
        options = {"prog": "ppo-fast train", "default": flags_of(default)}
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            found = tyro.cli(command, args=arguments, **options)
    except SystemExit as ended:
        if (refused := _raised_in_package(ended)) is not None:
            raise refused from None
        if ended.code and name in COMMANDS:
            check_flags(name, COMMANDS[name], rest)
        try:
            tyro.cli(command, args=arguments, **options)  # it prints help, or what is wrong
        except BrokenPipeError:  # ``| head`` has read enough
            Output().on_broken_pipe()
        raise
    return train_of(found) if isinstance(found, TrainFlags) else found


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
