"""Manifest of a checkpoint: a digest of every tensor and of all else, to find damage by."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

# of the entry that holds the manifest
MANIFEST = "manifest"


def make_manifest(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of what a checkpoint holds.

    Args:
        payload: tensors, numbers, texts, lists and dicts.

    Returns:
        tensors: by path, [dtype, shape, sha256 of the bytes]; rest: sha256 of all that is no
            tensor.
    """
    tensors = dict(_tensors(payload, ""))
    # hashlib lets other threads run while it works
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
        digests = list(pool.map(_digest, tensors.values()))
    return {
        "tensors": {
            path: [str(tensor.dtype), list(tensor.shape), digest]
            for (path, tensor), digest in zip(tensors.items(), digests, strict=True)
        },
        "rest": hashlib.sha256(json.dumps(_rest(payload)).encode()).hexdigest(),
    }


def find_damage(payload: Mapping[str, Any]) -> str | None:
    """Return the first thing in which a checkpoint differs from its manifest; None: nothing."""
    expected = payload.get(MANIFEST)
    if not isinstance(expected, dict) or expected.keys() != {"tensors", "rest"}:
        return "it has no manifest"
    found = make_manifest({k: v for k, v in payload.items() if k != MANIFEST})
    for path in sorted(found["tensors"].keys() | expected["tensors"].keys()):
        if found["tensors"].get(path) != expected["tensors"].get(path):
            return f"{path.lstrip('.')} is not what was written"
    return None if found["rest"] == expected["rest"] else "its numbers are not those written"


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor within ``value``, and its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _tensors(item, f"{path}.{number}")


def _digest(tensor: Tensor) -> str:
    raw = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _rest(value: Any) -> Any:
    """Return ``value`` as JSON has it, with None for tensors; keys keep their types and order."""
    if isinstance(value, Tensor):
        return None
    if isinstance(value, Mapping):
        return [[repr(key), _rest(item)] for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_rest(item) for item in value]
    return repr(value)
