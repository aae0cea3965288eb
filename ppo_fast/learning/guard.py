"""Guard: no weight becomes NaN or infinite."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_fast.config import PPOConfig
from ppo_fast.critics.critic import Critic
from ppo_fast.data.experience import Experience
from ppo_fast.data.tokens import Tokens
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.nonfinite import NotFiniteError, first_not_finite, gradients_of, weights_of

logger = logging.getLogger(__name__)

PROBE_TOKENS = 8


class Guard:
    """Decides whether an optimizer step is taken, and says what is not finite, and why.

    Args:
        policy, critic: that are trained.
        config: of the training.

    Attributes:
        skipped: optimizer steps in a row that were not taken, of each optimizer.
    """

    def __init__(self, policy: LanguageModel, critic: Critic, config: PPOConfig) -> None:
        self.modules = {"policy": policy.model, "value": critic.module}
        self.policy, self.critic, self.config = policy, critic, config
        self.skipped = {"policy": 0, "value": 0}

    def admits(
        self,
        norms: Mapping[str, Tensor],
        losses: Sequence[Tensor],
        experience: Experience,
        step: int,
    ) -> bool:
        """Return whether the optimizer step of a minibatch may be taken.

        Args:
            norms: of the gradients before clipping, by optimizer, 0-dim.
            losses: of the minibatch's parts, 0-dim.
            experience: that it is of.
            step: number of the step, for messages.

        Raises:
            NotFiniteError: it may not, and ``on_nonfinite`` is "stop", or ``max_skipped`` are
                reached.
        """
        found = torch.stack(list(norms.values()))
        # a norm that is finite is one of gradients whose squares, which AdamW takes, are too
        if bool(found.isfinite().all() & torch.stack(list(losses)).isfinite().all()):
            self.skipped |= dict.fromkeys(norms, 0)
            return True
        self.skipped |= {name: self.skipped[name] + 1 for name in norms}
        text = f"step {step}: {self._describe(norms, losses, experience)}"
        before = max(self.skipped[name] for name in norms) - 1
        if self.config.on_nonfinite == "skip" and before < self.config.max_skipped:
            logger.warning("%s; this optimizer step is left out (on_nonfinite='skip')", text)
            return False
        self.skipped |= dict.fromkeys(norms, 0)
        more = f"; so were the {before} before, left out" if before else ""
        raise NotFiniteError(f"{text}{more}. This optimizer step changed nothing")

    def _describe(
        self, norms: Mapping[str, Tensor], losses: Sequence[Tensor], experience: Experience
    ) -> str:
        """Say which tensors of which module are not finite, and what is the likely cause."""
        total = float(sum(losses))
        numbers = ", ".join(f"{name} {float(norm):.3g}" for name, norm in norms.items())
        texts = [f"the loss is {total:.3g}, gradient norms: {numbers}; expected finite numbers"]
        for name in norms:
            if (where := first_not_finite(gradients_of(self.modules[name]))) is not None:
                texts.append(f"the first gradient that is not is that of {where} of the {name}")
        return "; ".join([*texts, self._cause(total, experience)])

    def _cause(self, loss: float, experience: Experience) -> str:
        for name, module in self.modules.items():
            if (weight := first_not_finite(weights_of(module))) is not None:
                return f"likely cause: {weight} of the {name} holds NaN or infinity already"
        names = ("old_logprobs", "ref_logprobs", "values", "advantages", "returns")
        inputs = {name: getattr(experience, name) for name in names}
        if (name := first_not_finite(inputs)) is not None:  # type: ignore[assignment]
            return f"likely cause: {name} of the experience hold NaN or infinity"
        if loss != loss or loss in (float("inf"), float("-inf")):
            return (
                "likely cause: the model's outputs overflow; lower the learning rate, or look for "
                "NaN in the models' outputs"
            )
        return (
            "likely cause: the backward pass overflows; lower the learning rate or max_grad_norm, "
            "or compute in float32"
        )

    @torch.no_grad()
    def check_outputs(self) -> None:
        """Check that policy and value function still give finite numbers, for a few tokens.

        Raises:
            NotFiniteError: they do not.
        """
        config: Any = self.policy.model.config
        vocabulary = config.get_text_config().vocab_size
        ids = (torch.arange(PROBE_TOKENS, device=self.policy.device) % vocabulary)[None]
        lengths = [torch.tensor([n], device="cpu") for n in (PROBE_TOKENS - 1, 1)]
        probe = Tokens(ids[:, :-1], lengths[0], ids[:, -1:], lengths[1])
        forward = self.policy.forward(probe)
        found = {"policy": self.policy.logprobs(forward, probe, temperature=1.0).logprobs}
        if self.critic.trained:
            found["value function"] = self.critic.values(probe, forward.states)
        if (name := first_not_finite(found)) is not None:
            raise NotFiniteError(
                f"the outputs of the {name} are NaN or infinite: the last update has made its "
                "weights too large. Lower the learning rate, and go on from the newest checkpoint"
            )
