"""Write a folder of saved weights, with one kind of error where the disk does not take them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ppo_fast.disk.files import written_folder


@contextmanager
def exported(folder: Path) -> Iterator[Path]:
    """Within the block, write to the yielded folder; then it takes the place of ``folder``.

    Raises:
        OSError: the disk is full or fails; a ``folder`` that was there stays as it was. The errors
            of safetensors and tokenizers, which are written in Rust, are no OSErrors by themselves.
    """
    try:
        with written_folder(folder) as new:
            yield new
    except Exception as error:
        of_rust = isinstance(error, SafetensorError) or type(error) is Exception  # tokenizers'
        if not isinstance(error, OSError) and not of_rust:
            raise
        cause = " ".join(str(error).split())
        raise OSError(
            f"export: {folder} cannot be written ({cause}); what it held before stays"
        ) from error
