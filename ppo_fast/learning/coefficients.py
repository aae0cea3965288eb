"""Coefficients of the loss that change from step to step: of the KL and of the entropy bonus."""

from __future__ import annotations

from ppo_fast.config import PPOConfig


class Coefficients:
    """The coefficients of the KL to the reference and of the entropy bonus.

    Args:
        config: where they start, and their course.
    """

    def __init__(self, config: PPOConfig) -> None:
        self._config = config
        self._kl, self._bonus = config.kl_penalty, config.entropy_coef
        self._factor, self._by_hand = 1.0, False  # of a linear course; whether it was set

    @property
    def kl_changes(self) -> bool:
        """Whether the KL's coefficient is another than the config's, or may become another."""
        return self._by_hand or self._config.kl_controller != "fixed"

    def kl(self, share: float) -> float:
        """Return the KL's coefficient after a ``share`` of the schedule's steps."""
        end = self._config.kl_penalty_end
        if end is None:
            return self._kl
        return linear(self._config.kl_penalty, end, share) * self._factor

    def check_kl(self, coefficient: float, share: float) -> None:
        """Check that the KL's coefficient can be set.

        Raises:
            ValueError: it has a course, which cannot be scaled from 0, or to 0.
        """
        if self._config.kl_controller != "fixed" and 0 in (coefficient, self.kl(share)):
            raise ValueError(
                f"kl_penalty: got {coefficient}, where it is {self.kl(share):g} by "
                f"kl_controller={self._config.kl_controller!r}; a course can neither be scaled to "
                "0 nor from 0"
            )

    def set_kl(self, coefficient: float, share: float) -> None:
        """Set the KL's coefficient, after ``check_kl``; a linear course is scaled to it."""
        self._by_hand = True
        if self._config.kl_penalty_end is None:
            self._kl = coefficient
        else:
            self._factor *= coefficient / self.kl(share)

    def entropy(self, entropy: float) -> float:
        """Return the bonus's weight for a batch whose tokens have this mean ``entropy``, in nats.

        With a target, there is no bonus above it.
        """
        target = self._config.entropy_target
        return self._bonus if target is None or entropy <= target else 0.0

    def adapt(self, kl: float, entropy: float, count: int) -> None:
        """Adapt both, where they have targets, to a step's batch.

        Args:
            kl: KL to the reference, nats a sequence.
            entropy: nats a token.
            count: sequences of the batch.
        """
        config = self._config
        if config.kl_target is not None:
            self._kl = adapted_kl(self._kl, kl, config.kl_target, count / config.kl_horizon)
        if config.entropy_target is not None:
            self._bonus = adapted_bonus(
                self._bonus, entropy, config.entropy_target, config.entropy_coef_step
            )

    def state_dict(self) -> dict[str, float]:
        """Return what has adapted, or was set by hand."""
        return {
            "kl": self._kl,
            "bonus": self._bonus,
            "factor": self._factor,
            "by_hand": float(self._by_hand),
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what has adapted, or was set by hand; the rest stays the config's."""
        if self._config.kl_target is not None or state.get("by_hand"):
            self._kl = state["kl"]
        self._factor, self._by_hand = state.get("factor", 1.0), bool(state.get("by_hand"))
        if self._config.entropy_target is not None:
            self._bonus = state["bonus"]


def linear(start: float, end: float, share: float) -> float:
    """Return the number at a ``share`` of the way from ``start`` to ``end``, at most 1."""
    return start + (end - start) * min(share, 1.0)


def adapted_kl(coefficient: float, kl: float, target: float, share: float) -> float:
    """Return the next KL coefficient: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

    Args:
        coefficient: the last one.
        kl, target: KL of a batch and its target, nats a sequence.
        share: sequences of the batch, divided by the horizon.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * share)


def adapted_bonus(weight: float, entropy: float, target: float, change: float) -> float:
    """Return the next weight of the entropy bonus, at least 0: He et al. 2025 (Skywork-OR1)."""
    if entropy == target:
        return weight
    return max(weight + (change if entropy < target else -change), 0.0)
