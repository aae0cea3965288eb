"""An engine over transformers' own continuous batching (``generate_batch``), with a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ppo_fast.data.rollout import Rollout
from ppo_fast.data.sampling import Sampling
from ppo_fast.data.tokens import make_tokens
from ppo_fast.models.transformers_internals import (
    ContinuousBatchingConfig,
    in_order_of_requests,
    why_no_continuous_batching,
)


class TransformersEngine:
    """Samples with ``model.generate_batch``.

    Its log-probs are those of the distribution drawn from, so the trainer computes the old
    log-probs itself. One seed serves a whole batch: draws depend on what else is in the batch. It
    has neither stop strings nor ``min_new_tokens``, and raises ValueError for them.

    Args:
        model: a transformers causal LM; the policy itself, or a copy that ``sync_weights`` updates.
        eos_ids: ids that end a response.
        pad_id: id at padded positions.
        config: transformers' settings of its cache and batches; None: its defaults.

    Raises:
        TypeError: the model has no ``generate_batch``.
        RuntimeError: transformers is older than 5.9.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        config: ContinuousBatchingConfig | None = None,
    ) -> None:
        if not hasattr(model, "generate_batch"):
            raise TypeError(
                f"model: {type(model).__name__} has no generate_batch; use a transformers causal "
                "LM, or the trainer's own engine"
            )
        self.model: Any = model
        self.eos_ids, self.pad_id = list(eos_ids), pad_id
        self.config = config or ContinuousBatchingConfig()
        if (reason := why_no_continuous_batching()) is not None:
            raise RuntimeError(reason)

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Tensor
    ) -> Rollout:
        for name in ("min_new_tokens", "stop_strings"):
            if getattr(sampling, name):
                raise ValueError(
                    f"{name}: TransformersEngine does not support it; use the trainer's own engine"
                )
        ends = sorted({*self.eos_ids, *sampling.stop_token_ids})
        self.config.return_logprobs = True
        self.config.seed = int(seeds.sum()) % 2**31
        outputs = self.model.generate_batch(
            [list(ids) for ids in prompt_ids],
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_length,
                do_sample=True,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                eos_token_id=ends or -1,
                pad_token_id=self.pad_id,
            ),
            continuous_batching_config=self.config,
        )
        done = in_order_of_requests(outputs)
        errors = [output.error for output in done if output.error]
        if errors or [list(o.prompt_ids) for o in done] != [list(ids) for ids in prompt_ids]:
            raise RuntimeError(
                f"generate_batch: finished {len(done) - len(errors)} of {len(prompt_ids)} prompts"
                + (f" ({errors[0]})" if errors else "")
            )
        responses = [output.generated_tokens for output in done]
        device = next(self.model.parameters()).device
        tokens = make_tokens(prompt_ids, responses, self.pad_id, device)
        logprobs = torch.zeros(tokens.response_ids.shape, dtype=torch.float32, device="cpu")
        for row, output in zip(logprobs, done, strict=True):
            row[: len(output.logprobs)] = torch.tensor(output.logprobs, device="cpu")
        finished = torch.tensor([response[-1] in ends for response in responses], device="cpu")
        return Rollout(tokens, None, logprobs.to(device), finished, sampling)

    def sync_weights(self, model: nn.Module) -> None:
        if model is not self.model:
            self.model.load_state_dict(model.state_dict())

    def close(self) -> None:
        """Do nothing: nothing is held between calls."""
