"""AdamW for weights that are stored in bfloat16.

A weight in bfloat16 has eight significant bits: when rounding to nearest, a step below 1/512 of the
weight is lost. Two ways keep such steps (Zamirai et al. 2020, Revisiting BFloat16 Training, section
4): stochastic rounding gets them right on average, Kahan summation adds what was rounded off to the
next step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


class HalfAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) on bfloat16 weights, float32 ones as usual.

    Moments and all arithmetic are float32. Memory in bytes per weight, gradient included: 12 with
    stochastic rounding, 14 with Kahan summation, where float32 weights take 16.

    Args:
        params: the weights.
        lr, betas, eps, weight_decay: AdamW's.
        rounding: "stochastic" or "kahan".
        seed: seed of stochastic rounding, used with a step's number and a weight's index.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        rounding: Literal["stochastic", "kahan"],
        seed: int = 0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.rounding, self.seed = rounding, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        with torch.enable_grad():
            loss = None if closure is None else closure()
        index = itertools.count()  # over all groups: the seed of a weight's rounding
        for group in self.param_groups:
            for weight, number in zip(group["params"], index, strict=False):
                if weight.grad is not None:
                    self._add(weight, self._change(weight, group), number)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as any optimizer does, but keep the moments in float32.

        torch's own method would round the moments to the dtype of their weights.
        """
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, saved in state_dict["state"].items():
            for name in MOMENTS:
                state = self.state[weights[index]]
                state[name] = saved[name].to(state[name].device, copy=True)

    def _change(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """Compute what AdamW adds to ``weight``, float32."""
        state, gradient = self.state[weight], weight.grad.float()  # type: ignore[union-attr]
        if not state:
            state |= {"step": 0} | {name: torch.zeros_like(gradient) for name in MOMENTS}
        state["step"] += 1
        (beta1, beta2), first, second = group["betas"], *(state[name] for name in MOMENTS)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        mean = first / (1 - beta1 ** state["step"])
        root = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        change = mean.div_(root).mul_(-group["lr"])
        return change.sub_(weight, alpha=group["lr"] * group["weight_decay"])

    def _add(self, weight: Tensor, change: Tensor, index: int) -> None:
        if weight.dtype != torch.bfloat16:
            weight += change
        elif self.rounding == "stochastic":
            generator = torch.Generator(weight.device)
            step = self.state[weight]["step"]
            generator.manual_seed(hash((self.seed, step, index)) % 2**31)
            weight.copy_(stochastically_rounded(weight.float() + change, generator))
        else:
            lost = self.state[weight].setdefault("lost", torch.zeros_like(weight))
            before = weight.float()
            change += lost
            weight.copy_(before + change)
            lost.copy_(change.sub_(weight.float().sub_(before)))


def stochastically_rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up with the probability that makes the mean right."""
    bits = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    # a bfloat16 is the upper half of a float32
    return bits.add_(x.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()
