"""Load a reward by its name on the command line."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ppo_fast.models.pretrained import check_model, load_pretrained
from ppo_fast.user_code import place_of_error


def with_loaded(reward: Any) -> Any:
    """Return a reward, or a list or dict of several, with those that are names loaded.

    A name is a classifier's directory or hub name, or ``file.py:function``; see ``load_reward``.

    Raises:
        ValueError, FileNotFoundError: it cannot be loaded.
    """
    if isinstance(reward, Mapping):
        return {name: with_loaded(one) for name, one in reward.items()}
    if isinstance(reward, (list, tuple)):
        return [with_loaded(one) for one in reward]
    if not isinstance(reward, (str, Path)):
        return reward
    try:
        if function_of(str(reward)) is None:
            check_model("reward", str(reward))
        return load_reward(str(reward), "cpu")
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(str(error).replace("--reward", "reward")) from error


def load_rewards(
    rewards: Sequence[str], device: Any, label: str | None = None, **options: Any
) -> Any:
    """Load one reward as itself, or several as a list; see ``load_reward``.

    Raises:
        ValueError: there are several, and a label, which can be of one classifier alone.
    """
    if len(rewards) == 1:
        return load_reward(rewards[0], device, label, **options)
    classifiers = [reward for reward in rewards if function_of(reward) is None]
    if label is not None and len(classifiers) != 1:
        raise ValueError(
            f"--reward-label: got {label!r} for {len(classifiers)} classifiers, expected one"
        )
    return [
        load_reward(reward, device, label if reward in classifiers else None, **options)
        for reward in rewards
    ]


def load_reward(
    reward: str,
    device: Any,
    label: str | None = None,
    *,
    format: Any = None,
    cut_completions: bool = False,
    dtype: str = "float32",
) -> Any:
    """Load a function from ``module:function`` or ``file.py:function``, or a classifier.

    Args:
        reward: the function's name, or the directory or hub name of a sequence classifier.
        device: where the classifier goes.
        label: name or index of the classifier's label that is the score; see ClassifierReward.
        format, cut_completions: of the classifier; see ClassifierReward.
        dtype: of the classifier's weights; "auto": as they are saved.

    Raises:
        ValueError: the module cannot be imported or has no such function; the classifier cannot be
            loaded, or its label is not clear.
        FileNotFoundError: no such file.
    """
    if (parts := function_of(reward)) is not None:
        if label is not None:
            raise ValueError(f"--reward-label: {reward} is a function, which has no labels")
        return _load_function(*parts)
    from ppo_fast.rewards.classifier import ClassifierReward

    model, tokenizer = _load_classifier(reward, dtype)
    chosen: str | int | None = label
    if label is not None and label.isdigit() and label not in model.config.id2label.values():
        chosen = int(label)  # no name: an index
    return ClassifierReward(
        model.to(device),
        tokenizer,
        label=chosen,
        format=format,
        cut_completions=cut_completions,
    )


def function_of(reward: str) -> tuple[str, str] | None:
    """Return the module (or file) and the function that ``reward`` names; None for a classifier."""
    module, colon, function = reward.rpartition(":")  # the last: a path may begin with "C:"
    if not colon or Path(reward).exists():
        if reward.endswith(".py"):
            raise ValueError(f"--reward: got {reward!r}, expected {reward}:FUNCTION")
        return None
    if not module or not function:
        raise ValueError(f"--reward: got {reward!r}, expected MODULE:FUNCTION or FILE.py:FUNCTION")
    return module, function


def _load_classifier(reward: str, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, found = load_pretrained(
        "reward",
        AutoModelForSequenceClassification,
        reward,
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        output_loading_info=True,
    )
    if found["missing_keys"]:
        raise ValueError(
            f"--reward: {reward} holds no sequence classifier: it has no weights "
            f"{', '.join(sorted(found['missing_keys']))}"
        )
    return model, load_pretrained("reward", AutoTokenizer, reward)


def _load_function(name: str, function: str) -> Any:
    try:
        module = _import_file(Path(name)) if _is_file(name) else _import_module(name)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        if isinstance(error, FileNotFoundError) and str(error).startswith("--reward"):
            raise
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"--reward: {error}") from error
        raise ValueError(
            f"--reward: importing {name} raised {type(error).__name__}: {_message(error)}"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        near = difflib.get_close_matches(function, dir(module), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        kind = "file" if _is_file(name) else "module"
        raise ValueError(f"--reward: {kind} {name} has no function {function!r}{hint}")
    return found


def _is_file(name: str) -> bool:
    return name.endswith(".py") or "/" in name or "\\" in name


def _import_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does, for what the module imports too
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    path = path.expanduser()
    if not path.is_file() and path.with_suffix(".py").is_file():
        path = path.with_suffix(".py")
    if not path.is_file():
        raise FileNotFoundError(f"--reward: no file {path}")
    sys.path.insert(0, str(path.resolve().parent))  # as `python file.py` does
    name = path.stem if path.stem not in sys.modules else f"reward_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _message(error: BaseException) -> str:
    """Return an error's message with the file and line of the user's code at its end."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({error.filename}:{error.lineno})"
    return f"{error}{place_of_error(error)}"
