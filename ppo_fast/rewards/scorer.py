"""Scorer: calls the reward of a trainer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ppo_fast.data.rollout import Rollout
from ppo_fast.data.tokens import Tokens
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.setup import put_on_trunk
from ppo_fast.rewards.score import score


class Scorer:
    """Scores whole responses.

    Args:
        reward: a module or a function; see ``score``. A RewardModel whose lower layers equal the
            policy's frozen trunk shares them from now on.
        policy: the policy.
        max_tokens: max tokens in one call of a module.
    """

    def __init__(self, reward: Any, policy: LanguageModel, max_tokens: int) -> None:
        self.reward, self.max_tokens = reward, max_tokens
        self.split = put_on_trunk(reward, policy)

    @property
    def reads_trunk(self) -> bool:
        """Whether scores are computed from trunk states, those of last tokens included."""
        return self.split is not None

    def nbytes(self) -> int:
        """Return the size in bytes of a reward model's weights; 0 for a function."""
        own = self.reward if isinstance(self.reward, nn.Module) else None
        model = own or getattr(self.reward, "model", None)
        return sum(p.nbytes for p in model.parameters()) if isinstance(model, nn.Module) else 0

    def of_rollout(self, rollout: Rollout) -> Tensor:
        """Compute the score of each response, [B], or of each of its tokens, [B, T], float32.

        With ``reads_trunk``, the rollout must have a whole trunk.
        """
        return score(
            self.reward,
            rollout.tokens,
            rollout.prompts,
            rollout.completions,
            max_tokens=self.max_tokens,
            split=self.split,
            trunk_states=rollout.trunk_states,
        )

    def of_tokens(self, tokens: Tokens, prompts: list[str], completions: list[str]) -> Tensor:
        """Compute the same from tokens and texts alone."""
        return score(self.reward, tokens, prompts, completions, max_tokens=self.max_tokens)
