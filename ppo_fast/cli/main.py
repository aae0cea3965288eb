"""The command line: ``ppo-fast train``, ``demo``, ``env``, ``doctor`` and ``plan``."""

from __future__ import annotations

import csv
import difflib
import importlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
import yaml
from rich.console import Console

from ppo_fast.config import PPOConfig
from ppo_fast.diagnostics.env import print_environment

if TYPE_CHECKING:
    from ppo_fast.trainer import PPOTrainer


@dataclass(frozen=True)
class Train:
    """Train a policy on a file of prompts. Every field of PPOConfig is a flag."""

    policy: str = ""
    """The policy: a model directory or a hub name. Required."""
    prompts: Path = Path()
    """Prompts: .txt (one a line), .jsonl or .csv (their "prompt" field). Required."""
    reward: str = ""
    """module:function, f(prompts, completions) -> list[float], or the directory or name of a
    sequence classifier with one label. Required."""
    value_model: str | None = None
    """A causal LM whose body becomes the value model; None: see critic."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank on all layers, or on those of num_layers_unfrozen, with
    alpha twice the rank; None: the weights themselves."""
    output_dir: Path = Path("runs/train")
    """Gets metrics.jsonl, samples.jsonl, config.yaml, checkpoints/ and the trained policy/."""
    num_steps: int = 100
    """Steps of the whole run, those before a resume included."""
    batch_size: int = 16
    checkpoint_freq: int = 10
    resume: bool = False
    """Go on from the newest checkpoint in output_dir."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    config: Path | None = None
    """A YAML file of any of these flags (names with underscores); flags come before it."""
    ppo: tyro.conf.OmitArgPrefixes[PPOConfig] = field(default_factory=PPOConfig)


@dataclass(frozen=True)
class Demo:
    """Teach SmolLM2-135M to continue reviews kindly, on this machine, in some minutes."""

    output_dir: Path = Path("runs/demo")
    """Gets the metrics, samples, plot and the trained policy."""
    num_steps: int | None = None
    """Steps of PPO; None: the demo's own number."""
    seed: int = 0


@dataclass(frozen=True)
class Env:
    """Print versions, the device, and which implementation each op gets and why."""

    policy: str | None = None
    """A model directory or name; says which path its LM head takes."""


@dataclass(frozen=True)
class Doctor:
    """Check every kernel on this machine; on a GPU measure them too. Status 1 if one is wrong."""

    json: Path | None = None
    """Where to write the findings, for a bug report; None: they are printed."""
    interpret: bool = False
    """Check the values of the Triton kernels in Triton's interpreter, on the CPU (a minute)."""


@dataclass(frozen=True)
class Plan:
    """Print the memory that training a policy takes, from its config alone, in several ways."""

    policy: str
    """The policy: a model directory or a hub name; only its config is read."""
    batch_size: int = 16
    prompt_length: int = 128
    """Tokens of the longest prompt."""
    memory: float | None = None
    """GB that there are: which ways fit."""
    lora_rank: int = 16
    """Rank of the ways with LoRA, which are shown where peft is installed."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cuda or cpu, where a rollout copies weights that have adapters."""
    ppo: tyro.conf.OmitArgPrefixes[PPOConfig] = field(default_factory=PPOConfig)


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Env, tyro.conf.subcommand("env")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``ppo-fast``. Bad input ends it with one line on stderr and status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = parse(arguments)
        if isinstance(command, Train):
            train(command)
        elif isinstance(command, Demo):
            from ppo_fast.demo.run import run_demo

            run_demo(Console(), command.output_dir, num_steps=command.num_steps, seed=command.seed)
        elif isinstance(command, Doctor):
            from ppo_fast.diagnostics.doctor import run_doctor

            if not run_doctor(Console(), command.json, interpret=command.interpret):
                raise SystemExit(1)
        elif isinstance(command, Plan):
            plan(command)
        else:
            print_environment(Console(), command.policy)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("PPO_FAST_TRACEBACK"):
            raise
        print(f"ppo-fast: {error}\n(PPO_FAST_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(2) from error


def parse(arguments: list[str]) -> Train | Demo | Env | Doctor | Plan:
    """The command of the arguments, with the defaults of its ``--config`` file, if any."""
    default = _config_defaults(arguments)
    if default is None:
        return tyro.cli(Command, args=arguments, prog="ppo-fast", description=__doc__)
    return tyro.cli(Train, args=arguments[1:], default=default, prog="ppo-fast train")


def plan(asked: Plan) -> None:
    """``ppo-fast plan``."""
    from transformers import AutoConfig

    from ppo_fast.checks import check_counts
    from ppo_fast.diagnostics.memory_plan import plans, show_plans

    check_folder("policy", asked.policy)
    sizes = {name: getattr(asked, name) for name in ("batch_size", "prompt_length", "lora_rank")}
    check_counts(**sizes)
    model_config = AutoConfig.from_pretrained(asked.policy)
    found = plans(model_config, asked.ppo, **sizes, device=asked.device)
    show_plans(Console(), found, asked.memory)


def train(run: Train) -> None:
    """``ppo-fast train``."""
    from ppo_fast.checks import check_counts
    from ppo_fast.runs.folder import RunFolder, StepDisplay, step_logger

    for name in ("policy", "prompts", "reward"):
        if getattr(run, name) in ("", Path()):
            raise ValueError(f"--{name}: is required")
    for name in ("policy", "value_model", "reward"):
        check_folder(name, getattr(run, name))
    check_counts(lora_rank=1 if run.lora_rank is None else run.lora_rank)
    prompts = read_prompts(run.prompts)
    device = run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    reward = load_reward(run.reward, device)
    checkpoints = run.output_dir / "checkpoints"
    newest = newest_checkpoint(checkpoints)
    if newest is not None and not run.resume:
        raise ValueError(
            f"--output-dir: {run.output_dir} holds a run ({newest.name}); go on with --resume, or "
            "name another folder"
        )
    trainer = make_trainer(run, reward, device)
    console, folder = Console(), RunFolder(run.output_dir)
    if newest is not None:
        console.print(f"resumed {newest} after step {trainer.load_checkpoint(newest)}")
    done = int(trainer.stats["total_steps"])
    remaining = run.num_steps - done
    if remaining <= 0:
        raise ValueError(f"--num-steps: got {run.num_steps}, expected more than the {done} done")
    # what --config named is among them
    settings = {
        f.name: getattr(run, f.name) for f in fields(run) if f.name not in ("ppo", "config")
    }
    folder.write_config(trainer.config, **settings)
    folder.forget_after(done)
    with StepDisplay(console, remaining) as display:
        trainer.train(
            prompts,
            num_steps=remaining,
            batch_size=run.batch_size,
            checkpoint_dir=checkpoints,
            checkpoint_freq=run.checkpoint_freq,
            progress=False,
            on_step=step_logger(trainer, folder, display),
        )
    trainer.save_checkpoint(checkpoints, int(trainer.stats["total_steps"]))
    save_policy(trainer.policy_model, trainer.tokenizer, run.output_dir / "policy")
    console.print(f"trained policy: {run.output_dir / 'policy'}")


def make_trainer(run: Train, reward: Any, device: str) -> PPOTrainer:
    """The trainer of a run: its models from their folders or the hub."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    from ppo_fast.models.heads import ValueModel
    from ppo_fast.models.lora import with_lora
    from ppo_fast.trainer import PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(run.policy)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = torch.float32 if run.ppo.compute_dtype is None else "auto"
    policy = AutoModelForCausalLM.from_pretrained(run.policy, dtype=dtype)
    if run.lora_rank is not None:
        policy = with_lora(policy, run.lora_rank, run.ppo.num_layers_unfrozen)
    value_model = None
    if run.value_model is not None:
        base = AutoModel.from_pretrained(run.value_model, dtype=torch.float32)  # no LM head
        value_model = ValueModel(base, base.config.get_text_config().hidden_size)
    return PPOTrainer(policy, value_model, reward, tokenizer, device, config=run.ppo)


def check_folder(flag: str, model: str | None) -> None:
    """Raise FileNotFoundError for a path to nothing: the hub would be asked for it otherwise."""
    path = Path(model or "")
    is_path = path.is_absolute() or len(path.parts) > 2 or (model or "").startswith(".")
    if model and ":" not in model and is_path and not path.is_dir():
        raise FileNotFoundError(f"--{flag.replace('_', '-')}: no folder {model}")


def read_prompts(path: Path) -> list[str]:
    """Prompts from a .txt (one a line, empty lines skipped), .jsonl or .csv file ("prompt").

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, a line without a "prompt", or no prompts at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--prompts: no file {path}")
    text = path.read_text("utf-8-sig")
    if path.suffix == ".txt":
        prompts = [line for line in text.split("\n") if line.strip()]
    elif path.suffix == ".jsonl":
        # not splitlines: JSON strings may hold U+2028 and its like
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        prompts = [_prompt_of(_json(line, path, n), path, n) for n, line in lines]
    elif path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text))
        prompts = [_prompt_of(row, path, n) for n, row in enumerate(rows, 2)]
    else:
        raise ValueError(f"--prompts: {path} ends in {path.suffix!r}, expected .txt, .jsonl, .csv")
    if not prompts:
        raise ValueError(f"--prompts: {path} holds no prompts")
    return prompts


def load_reward(reward: str, device: str) -> Any:
    """A reward function from ``module:function``, or a classifier's directory or hub name.

    Raises:
        ValueError: the module has no such function, or the classifier has several labels.
        ModuleNotFoundError: no such module.
    """
    name, colon, function = reward.partition(":")
    if not colon or Path(reward).exists():
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from ppo_fast.rewards.score import ClassifierReward

        model = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32)
        return ClassifierReward(model.to(device), AutoTokenizer.from_pretrained(reward))
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does, for what the module imports too
    module = importlib.import_module(name)
    found = getattr(module, function, None)
    if not callable(found):
        near = difflib.get_close_matches(function, dir(module), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"--reward: module {name} has no function {function!r}{hint}")
    return found


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in ``folder``."""
    files = folder.glob("ppo_checkpoint_step_*.pt")
    return max(files, key=lambda f: int(f.stem.rpartition("_")[2]), default=None)


def save_policy(policy: Any, tokenizer: Any, folder: Path) -> None:
    """``save_pretrained`` of both in ``folder``, which is replaced only by a complete one. Adapters
    are merged: it is a whole model."""
    from ppo_fast.models.adapters import base_of, merged_adapters

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        with merged_adapters(policy):
            base_of(policy).save_pretrained(new)
        tokenizer.save_pretrained(new)
        if folder.exists():
            shutil.move(folder, Path(temporary) / "old")
        shutil.move(new, folder)


def _config_defaults(arguments: list[str]) -> Train | None:
    """Train's defaults from the file after ``--config``; None without one."""
    if not arguments or arguments[0] != "train":
        return None
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--config" and (equals or i + 1 < len(arguments)):
            return read_config(Path(value if equals else arguments[i + 1]))
    return None


def read_config(path: Path) -> Train:
    """A YAML file of Train's and PPOConfig's fields.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key that is no field (the nearest one is named), or a value out of range.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config: no file {path}")
    settings = yaml.safe_load(path.read_text("utf-8")) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"--config: {path} holds no mapping of names to values")
    run_fields = {f.name for f in fields(Train)} - {"ppo"}
    ppo_fields = set(asdict(PPOConfig()))
    for key in settings:
        if key not in run_fields | ppo_fields:
            near = difflib.get_close_matches(str(key), run_fields | ppo_fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--config: {path} sets {key!r}, which is no flag{hint}")
    paths = ("prompts", "output_dir")
    run: dict[str, Any] = {
        k: Path(v) if k in paths else v for k, v in settings.items() if k in run_fields
    }
    ppo: dict[str, Any] = {
        k: tuple(v) if k == "adam_betas" else _number(v)
        for k, v in settings.items()
        if k in ppo_fields
    }
    return replace(Train(**run | {"config": path}), ppo=PPOConfig(**ppo))


def _number(value: Any) -> Any:
    """YAML takes 1e-5, without a dot, for a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"--prompts: {path} line {number} is not JSON: {error}") from error


def _prompt_of(record: Any, path: Path, number: int) -> str:
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f'--prompts: {path} line {number} has no "prompt" that is a string')
    return prompt
