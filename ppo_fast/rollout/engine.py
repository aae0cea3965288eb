"""Who samples: an engine turns prompts into a Rollout; the local one decodes with the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.data.rollout import Rollout
from ppo_fast.data.sampling import Sampling


class Engine(Protocol):
    """Samples responses. ``PPOTrainer(..., engine=...)`` takes one; another process may stand
    behind it. ``Rollout.sampling_logprobs`` must be filled; with ``logprobs`` None the trainer
    computes the old log-probs itself."""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Tensor
    ) -> Rollout:
        """A response for each of B prompts (lists of ids), drawn as ``sampling`` says.

        ``seeds`` [B] int64: equal seeds, equal responses, as far as the engine can.
        """
        ...

    def sync_weights(self, model: nn.Module) -> None:
        """Take the policy's weights: called before every ``generate``, for whoever holds the open
        loop may change them between any two."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def eos_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's EOS and those of the model's generation config."""
    configured: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})
