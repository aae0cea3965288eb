"""Names of metrics: this package's, or those of TRL's PPOTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

MetricNames = Literal["ppo_fast", "trl"]
NAMES: tuple[MetricNames, ...] = ("ppo_fast", "trl")

# Of TRL 1.12's metrics, those whose meaning is the same whatever the settings are.
SAME = {
    "kl_sequence": "objective/kl",
    "mean_reward": "objective/scores",
    "policy_loss": "loss/policy_avg",
    "value_loss": "loss/value_avg",
    "clip_fraction": "policy/clipfrac_avg",
    "value_clip_fraction": "val/clipfrac_avg",
    "ratio_mean": "val/ratio",
    "learning_rate": "lr",
}


def in_names_of_trl(
    metrics: Mapping[str, float],
    *,
    step: int = 0,
    sequences: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Return a step's metrics under the names of TRL 1.12's PPOTrainer.

    A metric that TRL lacks, or that has another meaning there, keeps its name: docs/metrics.md has
    the table.

    Args:
        metrics: those of a ``Step``.
        step: its number.
        sequences: responses of the step.
        settings: those of the run, for ``kl_penalty``, ``kl_in`` and others; what depends on one
            that is missing is left out.
    """
    settings = settings or {}
    found = {SAME.get(name, name): value for name, value in metrics.items()}
    name = _name_of_entropy(settings)
    if name == "objective/entropy" and {"entropy", "response_length"} <= metrics.keys():
        found[name] = found.pop("entropy") * metrics["response_length"]
    elif name == "policy/entropy_avg" and "entropy" in metrics:
        found[name] = found.pop("entropy")
    if "objective/scores" in found and settings.get("missing_eos_penalty"):
        cut_off = 1 - metrics["finished_fraction"]
        found["objective/scores"] -= settings["missing_eos_penalty"] * cut_off
    coefficient = metrics.get("kl_coefficient", settings.get("kl_penalty"))
    k1 = settings.get("kl_estimator") in (None, "k1") and settings.get("kl_in") == "reward"
    if coefficient is not None and k1 and {"kl_sequence", "mean_reward"} <= metrics.keys():
        penalty = -coefficient * metrics["kl_sequence"]
        found["objective/non_score_reward"] = penalty
        found["objective/rlhf_reward"] = found["objective/scores"] + penalty
    if "eos_share" in metrics and sequences:
        found["val/num_eos_tokens"] = float(round(found.pop("eos_share") * sequences))
    if sequences and step:
        found["episode"] = float(step * sequences)
    return found


def _name_of_entropy(settings: Mapping[str, Any]) -> str:
    """Return TRL's name of what ``entropy`` is with these settings; "entropy": it has none."""
    if settings.get("entropy_target") is not None:  # it depends on the step which one it is
        return "entropy"
    if settings.get("entropy_coef") and settings.get("entropy_bonus_share", 1.0) == 1:
        return "policy/entropy_avg"
    return "entropy" if settings.get("mask_truncated") else "objective/entropy"
