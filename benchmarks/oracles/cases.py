"""Random batches: shapes, masks, log-probs and what else the functions take."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_fast.data.tokens import Tokens
from ppo_fast.ops.backends.impls import Impl

MASKS = ("full", "padded", "holes", "empty rows")


def for_cases(
    count: int = 300, masks: tuple[str, ...] = MASKS
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test of a check of one case: it runs the check on ``count`` random ones.

    They are the same in each run, and others for each test and each of its parameters.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        def test(**parameters: Any) -> None:
            for number in range(count):
                check(Case(f"{check.__name__} {parameters} {number}", masks), **parameters)

        signature = inspect.signature(check)
        (_, *others) = signature.parameters.values()
        test.__name__, test.__doc__ = check.__name__, check.__doc__
        test.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return test

    return decorate


class Case:
    """One random batch. Legend: B sequences, T response tokens.

    Tensors have finite numbers where the mask is False too: nothing may read them.

    draw: for numbers and names of options.
    dtype: float32 or float64.
    impl: of our ops, "cpp" or "reference".
    mask: [B, T] bool, with at least one valid token. "padded" rows end early, rows with "holes"
        have masked tokens inside too, and "empty rows" may have no valid token.
    """

    def __init__(self, seed: str, masks: tuple[str, ...]) -> None:
        self.draw = random.Random(seed)
        self._generator = torch.Generator().manual_seed(self.draw.getrandbits(60))
        self.dtype = self.draw.choice((torch.float32, torch.float64))
        self.impl: Impl = self.draw.choice(("cpp", "reference"))
        self.rows, self.steps = self.draw.randint(1, 6), self.draw.randint(1, 17)
        self.mask = self._mask(self.draw.choice(masks))

    @property
    def floats(self) -> Tensor:
        """The mask as others take it: 1 and 0 in the batch's dtype."""
        return self.mask.to(self.dtype)

    def normal(self, scale: float = 1.0, *, of_rows: bool = False) -> Tensor:
        """Draw [B, T] numbers, or [B] ``of_rows``."""
        shape = (self.rows,) if of_rows else (self.rows, self.steps)
        numbers = torch.randn(shape, generator=self._generator, dtype=torch.float32)
        return (scale * numbers).to(self.dtype)

    def same_in_rows(self) -> Tensor:
        """Draw [B, T] numbers, one for all tokens of a row."""
        return self.normal(of_rows=True)[:, None].expand(self.rows, self.steps)

    def logprobs(self) -> Tensor:
        return -self.normal(2.0).abs()

    def near(self, logprobs: Tensor) -> Tensor:
        """Draw log-probs of another policy: ratios of about 1, around the clip, or far off."""
        return logprobs + self.normal(self.draw.choice((0.02, 0.3, 1.5)))

    def tokens(self) -> Tokens:
        """Give token ids to the mask: a row is as long as its last valid token; holes are read."""
        steps = torch.arange(1, self.steps + 1)
        lengths = (self.mask * steps).amax(1)
        ids = torch.zeros(self.rows, self.steps, dtype=torch.int64)
        one = torch.ones(self.rows, dtype=torch.int64)
        return Tokens(ids[:, :1], one, ids, lengths, self.mask)

    def make_groups(self, samples: int | None = None) -> int:
        """Make the rows groups of 2 to 5, or of ``samples``; return the rows of a group.

        All rows have tokens, and end early or not.
        """
        samples = samples or self.draw.randint(2, 5)
        self.rows = samples * self.draw.randint(1, 3)
        lengths = torch.tensor([self.draw.randint(1, self.steps) for _ in range(self.rows)])
        self.mask = torch.arange(self.steps) < lengths[:, None]
        return samples

    def _mask(self, kind: str) -> Tensor:
        mask = torch.ones(self.rows, self.steps, dtype=torch.bool)
        if kind == "full":
            return mask
        low = 0 if kind == "empty rows" else 1
        lengths = torch.tensor([self.draw.randint(low, self.steps) for _ in range(self.rows)])
        mask &= torch.arange(self.steps) < lengths[:, None]
        if kind == "holes":
            mask &= torch.rand(mask.shape, generator=self._generator) > 0.3
        if not mask.any() or (kind == "holes" and not mask.any(1).all()):
            mask[:, 0] = True
        return mask


def with_gradients(
    function: Callable[..., Tensor], *inputs: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return the value of a function and its gradients with respect to ``inputs``."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream)
