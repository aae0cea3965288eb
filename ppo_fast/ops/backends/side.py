"""One side of a comparison of an op's kernels with the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppo_fast.ops.backends.impls import Impl


class Side:
    """One side of a comparison: implementation, device, dtype, and the same random inputs."""

    def __init__(
        self, impl: Impl, device: torch.device, dtype: torch.dtype, holds: torch.dtype
    ) -> None:
        """Round inputs to ``dtype`` and convert them to ``holds``: float64 for the reference."""
        self.impl, self.device = impl, device
        self._dtype, self._holds = dtype, holds
        self._generator = torch.Generator("cpu").manual_seed(1)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Draw normal numbers of 8 significant bits: exact in bfloat16, and as factors in TF32."""
        return self._normal(shape, scale).to(self._dtype).to(self.device, self._holds)

    def integers(self, high: int, *shape: int) -> Tensor:
        x = torch.randint(high, shape, generator=self._generator, device="cpu")
        return x.to(self.device)

    def mask(self, *shape: int) -> Tensor:
        """Draw a mask that is True three times out of four."""
        return self.integers(4, *shape) > 0

    def gradients(self, outputs: list[Tensor], **inputs: Tensor) -> dict[str, Tensor]:
        """Return the gradients of the named inputs, for random upstream gradients."""
        upstream = [self._normal(tuple(y.shape), 1.0).to(y) for y in outputs]
        grads = torch.autograd.grad(outputs, list(inputs.values()), upstream)
        return {f"gradient of {x}": grad for x, grad in zip(inputs, grads, strict=True)}

    def _normal(self, shape: tuple[int, ...], scale: float) -> Tensor:
        x = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return (x * scale).bfloat16().float()


def nan_outside(mask: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` with NaN where ``mask`` is false: no kernel may read there."""
    return x.masked_fill(~mask, math.nan)
