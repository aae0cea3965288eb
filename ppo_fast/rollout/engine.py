"""Engine: the protocol of what samples responses, and the ids that end a response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.data.rollout import Rollout
from ppo_fast.data.sampling import Sampling

# Given the row of a response that has ended, and all of its ids.
OnIds = Callable[[int, list[int]], None]


class Engine(Protocol):
    """Samples responses, in this process or another; ``PPOTrainer(..., engine=...)`` takes one.

    ``Rollout.sampling_logprobs`` must be filled. If ``logprobs`` is None, the trainer computes the
    old log-probs itself.
    """

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Tensor
    ) -> Rollout:
        """Sample a response for each of B prompts (lists of ids), as ``sampling`` says.

        ``seeds`` [B] int64: equal seeds give equal responses, as far as the engine can.

        An engine may take ``ended``, an OnIds or None, too, and call it in this thread as soon as a
        response has ended: rewards that ask servers then need not wait for the others.
        """
        ...

    def sync_weights(self, model: nn.Module) -> None:
        """Take the policy's weights.

        It is called before every ``generate``: code that runs the steps itself may change the
        weights between any two calls.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def eos_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokenizer's EOS id and those of the model's generation config, sorted."""
    configured: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})
