"""Storage dtype of weights and compute dtype of models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ppo_fast.models.quantized import bits_of, packed_weights
from ppo_fast.models.transformers_internals import Conv1D
from ppo_fast.ops.gradient import without_autocast
from ppo_fast.ops.validation import HALF as HALF

# Largest difference that rounding explains between two ways to compute logits or states, relative
# to the largest of them.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
TF32_TOLERANCE = 5e-3
HALF_TOLERANCE = 3e-2

# Max bytes of the copies in float32 by which ways to compute in half precision are judged.
EXACT_BYTES = 2**31


def computing_in(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """Within the block, autocast to ``dtype``; None: each product in the dtype of its operands."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype of the autocast that is in force on this kind of device, or None."""
    if device == "meta":
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@contextmanager
def computing_in_float32(module: nn.Module) -> Iterator[None]:
    """Within the block, autocast is off, and weights in half precision are copies in float32.

    Raises:
        RuntimeError: the copies would be larger than ``EXACT_BYTES``.
    """
    half = [weight for weight in module.parameters() if weight.dtype in HALF]
    if sum(4 * weight.numel() for weight in half) > EXACT_BYTES:
        raise RuntimeError("the model is too large for a copy in float32")
    held = [weight.data for weight in half]
    try:
        for weight in half:
            weight.data = weight.data.float()
        with without_autocast(next(module.parameters()).device):
            yield
    finally:
        for weight, data in zip(half, held, strict=True):
            weight.data = data


def uses_tf32(device: torch.device) -> bool:
    """Return whether float32 products on ``device`` are computed in TF32.

    torch has two interfaces that choose it; the old one raises after the new one was used.
    """
    matmul = torch.backends.cuda.matmul
    if device.type != "cuda":
        return False
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and newer
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest relative difference that rounding explains, for weights of ``dtype``.

    It is relative to the largest number, between two ways to compute the same logits or states.
    """
    if dtype == torch.float32 and uses_tf32(device):
        return TF32_TOLERANCE
    return TOLERANCE.get(dtype, HALF_TOLERANCE)


def hold_trained_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the trained weights of ``model`` to ``dtype``, except those of float64."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float64:
            parameter.data = parameter.data.to(dtype)


def hold_products_in(dtype: torch.dtype, model: nn.Module, *, without: nn.Module) -> None:
    """Convert the weights of linear layers to ``dtype``.

    Autocast would convert them to the same numbers, bit for bit, at every call. Weights that
    ``without`` shares, and the embedding's, stay as they are.
    """
    shared = {*without.parameters(), model.get_input_embeddings().weight}  # type: ignore[operator]
    for module in model.modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or bits_of(module) is not None:
            continue
        if module.weight not in shared:
            module.weight.data = module.weight.data.to(dtype)


class WeightCopies:
    """Copies of float32 weights in another dtype, so that no decoding step casts them anew.

    Args:
        dtype: dtype of the copies; None: none are made.
        kept_bytes: max total size of copies that stay for the next use, at their addresses.
        autocast: cast by autocast instead, at every use, for models that mix float32 buffers with
            their weights.
    """

    def __init__(
        self, dtype: torch.dtype | None, kept_bytes: int = 0, *, autocast: bool = False
    ) -> None:
        self.dtype, self.kept_bytes, self.autocast = dtype, kept_bytes, autocast
        self._kept: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def in_use(self, model: nn.Module) -> Iterator[None]:
        """Temporarily replace the model's float32 weights by copies."""
        if self.autocast:
            with computing_in(self.dtype, next(model.parameters()).device):
                yield
            return
        packed = packed_weights(model)
        cast = [
            p
            for p in model.parameters()
            if self.dtype and p.dtype == torch.float32 and p not in packed
        ]
        held = [parameter.data for parameter in cast]
        copies, self._kept = self._kept, {}
        try:
            for parameter in cast:
                parameter.data = self._copy(parameter, copies.pop(parameter, None))
            yield
            if sum(parameter.data.nbytes for parameter in cast) <= self.kept_bytes:
                self._kept = {parameter: parameter.data for parameter in cast}
        finally:
            for parameter, data in zip(cast, held, strict=True):
                parameter.data = data

    def _copy(self, parameter: nn.Parameter, copy: Tensor | None) -> Tensor:
        """Return a copy of the weight in ``dtype``, made in the memory of ``copy`` if that fits."""
        data = parameter.data
        if copy is None or (copy.shape, copy.device) != (data.shape, data.device):
            return data.to(self.dtype)
        return copy.copy_(data)
