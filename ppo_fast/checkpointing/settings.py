"""Settle which numbers count where a run goes on with other settings than before."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

# Settings of which a number set by hand in the run is another form.
BY_HAND = {"learning_rate": "policy", "value_learning_rate": "value", "kl_penalty": "kl"}


def settle_settings(contents: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return the learner's state of a checkpoint, for a trainer with these settings.

    Where a setting was changed since the checkpoint, it counts, and not the number that was set by
    hand in the run. Both are logged.

    Args:
        contents: of the checkpoint that was loaded.
        config: the trainer's settings.
    """
    before, learner = contents.get("config", {}), dict(contents.get("learner", {}))
    changed = {name for name, value in config.items() if before.get(name, value) != value}
    if changed:
        listed = ", ".join(f"{n} {before[n]!r} -> {config[n]!r}" for n in sorted(changed))
        logger.warning("settings changed since the checkpoint: %s", listed)
    given = {BY_HAND[name] for name in changed if name in BY_HAND}
    if config["value_learning_rate"] is None and "policy" in given:
        given.add("value")
    if not learner:
        return learner
    learner["rates"] = {k: v for k, v in learner.get("rates", {}).items() if k not in given}
    if "kl" in given:
        learner["coefficients"] = learner["coefficients"] | {"by_hand": 0.0, "factor": 1.0}
    by_hand = [f"the rate of the {name} is {rate:g}" for name, rate in learner["rates"].items()]
    if learner["coefficients"].get("by_hand"):
        by_hand.append("the KL's coefficient")
    if by_hand:
        logger.warning("as changed in the run before: %s", ", ".join(by_hand))
    return learner
