"""Learning rates over a run's optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from transformers import get_scheduler

from ppo_fast.checks import LARGEST_WHOLE
from ppo_fast.config import PPOConfig

NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine_with_min_lr"}


def is_scheduled(config: PPOConfig) -> bool:
    """Return whether learning rates change in the course of a run."""
    return config.lr_schedule != "constant" or config.lr_warmup > 0


def needs_run_length(config: PPOConfig) -> bool:
    """Return whether a schedule depends on the number of a run's steps."""
    shared = 0 < config.lr_warmup < 1
    return config.lr_schedule != "constant" or shared or config.kl_controller == "linear"


def rate_factor(config: PPOConfig, total: int) -> Callable[[int], float]:
    """Return the function from optimizer steps done to the factor of the next step's rate.

    The course is that of transformers' ``get_scheduler``, of ``total`` optimizer steps.

    Raises:
        ValueError: the warm-up takes longer than ``total`` steps.
    """
    warmup = int(config.lr_warmup if config.lr_warmup >= 1 else config.lr_warmup * total)
    if config.lr_schedule != "constant" and warmup >= total:
        raise ValueError(
            f"lr_warmup: got {config.lr_warmup}, {warmup} optimizer steps, but the run has "
            f"{total}; expected fewer"
        )
    floor = {"min_lr_rate": config.lr_floor} if config.lr_schedule == "cosine" else {}
    scheduler = get_scheduler(
        NAMES[config.lr_schedule],
        SGD([nn.Parameter(torch.zeros((), device="cpu"))], lr=1.0),  # its rates are not used
        num_warmup_steps=warmup,
        num_training_steps=total,
        scheduler_specific_kwargs=floor,
    )
    factor = scheduler.lr_lambdas[0]
    # beyond the end, the last rate: a cosine would rise again
    end = total if needs_run_length(config) else LARGEST_WHOLE
    return lambda done: float(factor(min(done, end)))


class Schedule:
    """Learning rates of a run's optimizers.

    A rate follows from the number of steps of PPO that are done and the optimizer steps of the
    update: each step of PPO has ``num_epochs`` times ``num_minibatches`` of these, even where a
    small batch or ``target_kl`` leaves some out. So a resumed run needs no state of it.

    Args:
        config: the course of the rates.
        rates: the highest rate of each optimizer, by name.

    Attributes:
        steps: steps of PPO done before the update that began last.
        changed: the highest rates that were set by hand, by name.
    """

    def __init__(self, config: PPOConfig, rates: dict[str, float]) -> None:
        self._config, self._given, self._rates = config, rates, dict(rates)
        self._total, self._epochs = config.schedule_steps, config.num_epochs
        self._factors: dict[str, Callable[[int], float]] = {}
        self.steps, self._made = 0, dict.fromkeys(rates, 0)
        self._suspended = False
        self.changed: dict[str, float] = {}

    def check_rate(self, name: str, optimizer: Optimizer) -> None:
        """Check that an optimizer's rate can be set by hand.

        Raises:
            ValueError: it is that of a scheduler of the user's own.
        """
        if any("initial_lr" in group for group in optimizer.param_groups):
            raise ValueError(f"the rate of the {name} is that of a scheduler of your own")

    def set_rate(self, name: str, rate: float, optimizer: Optimizer) -> float:
        """Set an optimizer's highest rate, and return the one before.

        Its course is scaled; so are the rates of all its groups, where there is no schedule.
        """
        if is_scheduled(self._config):
            before = self._rates[name]
        else:
            before = float(optimizer.param_groups[0]["lr"])
            for group in optimizer.param_groups:
                group["lr"] = rate if group["lr"] == before else group["lr"] * rate / before
        self._rates[name] = self.changed[name] = rate
        return before

    def reset_rates(self, optimizers: Mapping[str, Optimizer]) -> None:
        """Take back the rates that were set by hand."""
        for name in list(self.changed):
            self.set_rate(name, self._given[name], optimizers[name])
        self.changed = {}

    def plan(self, total_steps: int, num_epochs: int) -> None:
        """Plan a run of ``total_steps`` steps of PPO, those already done included.

        Raises:
            ValueError: a schedule, or the critic's warm-up, is longer than the run.
        """
        config = self._config
        lengths = {"schedule_steps": config.schedule_steps or 0}
        if config.critic_warmup_steps:
            lengths["critic_warmup_steps"] = config.critic_warmup_steps + 1  # the policy's first
        for name, steps in lengths.items():
            if steps > total_steps:
                raise ValueError(
                    f"{name}: got {getattr(config, name)}, but the run has {total_steps} steps; "
                    "lower it, or run more steps"
                )
        self._total, self._epochs = config.schedule_steps or total_steps, num_epochs
        self._factors = {}
        self.check(0)

    def check(self, steps: int) -> None:
        """Check that what the schedules depend on is known, and that they fit it.

        Args:
            steps: steps of PPO done.

        Raises:
            ValueError: it is not known, they do not fit, or they have ended at a rate of 0.
        """
        if self._suspended:
            return
        if needs_run_length(self._config) and self._total is None:
            raise ValueError(
                "lr_schedule, lr_warmup or kl_controller='linear' depends on the number of steps, "
                "which step() does not know; call train(), or set schedule_steps"
            )
        ends_at_0 = self._config.lr_schedule != "constant" and self._config.lr_floor == 0
        if ends_at_0 and self._total is not None and steps >= self._total:
            raise ValueError(
                f"lr_schedule: the learning rate is 0 after the schedule's {self._total} steps, "
                f"and {steps} are done; call train(), or raise schedule_steps"
            )
        if is_scheduled(self._config):
            for name in self._rates:
                self._factor(name)

    def share(self, steps: int) -> float:
        """Return the share of the schedule that is done after ``steps`` steps of PPO.

        0 before the first, 1 at the last; 0 where the length of the run is not known.
        """
        return 0.0 if self._total is None else min(steps / max(self._total - 1, 1), 1.0)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within the block, all rates are the highest."""
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False

    def begin_update(self, steps: int) -> None:
        """Begin the update after ``steps`` steps of PPO."""
        self.steps, self._made = steps, dict.fromkeys(self._rates, 0)

    def before_step(self, name: str, optimizer: Optimizer) -> None:
        """Set the rate of an optimizer's next step in the update.

        Without a schedule the rate is left alone: it may be that of the user's own scheduler.
        """
        if is_scheduled(self._config):
            skipped = self._config.critic_warmup_steps if name == "policy" else 0
            made = (self.steps - skipped) * self._per_step(name) + self._made[name]
            factor = 1.0 if self._suspended else self._factor(name)(made)
            for group in optimizer.param_groups:
                group["lr"] = self._rates[name] * factor
        self._made[name] += 1

    def _per_step(self, name: str) -> int:
        """Return the number of optimizer steps in a step of PPO."""
        epochs = self._epochs if name == "policy" else self._config.value_epochs or self._epochs
        return epochs * self._config.num_minibatches

    def _factor(self, name: str) -> Callable[[int], float]:
        if name not in self._factors:
            skipped = self._config.critic_warmup_steps if name == "policy" else 0
            total = max((self._total or 0) - skipped, 0) * self._per_step(name)
            self._factors[name] = rate_factor(self._config, total)
        return self._factors[name]


def current_rates(optimizers: dict[str, Optimizer]) -> dict[str, float]:
    """Return the metrics learning_rate and, with a value function, value_learning_rate."""
    names = {"policy": "learning_rate", "value": "value_learning_rate"}
    return {names[name]: float(o.param_groups[0]["lr"]) for name, o in optimizers.items()}
