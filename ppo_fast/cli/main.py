"""The command line: ``ppo-fast train``, ``demo``, ``env``, ``doctor`` and ``plan``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from ppo_fast.cli.config_file import config_defaults
from ppo_fast.cli.demo import Demo
from ppo_fast.cli.doctor import Doctor
from ppo_fast.cli.env import Env
from ppo_fast.cli.plan import Plan
from ppo_fast.cli.train import Train

Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Env, tyro.conf.subcommand("env")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``ppo-fast``. On bad input, print one line on stderr and exit with status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parse(arguments).run(Console())
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("PPO_FAST_TRACEBACK"):
            raise
        print(f"ppo-fast: {error}\n(PPO_FAST_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(2) from error


def parse(arguments: list[str]) -> Train | Demo | Env | Doctor | Plan:
    """Parse the arguments to a command, with the defaults of its ``--config`` file, if any."""
    default = config_defaults(arguments)
    if default is None:
        return tyro.cli(Command, args=arguments, prog="ppo-fast", description=__doc__)
    return tyro.cli(Train, args=arguments[1:], default=default, prog="ppo-fast train")
