"""RewardModelConfig: every setting of the training of a reward model."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from ppo_fast.checks import allowed, check_fields, number, whole


def _is_warmup(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return 0 <= float(value) < 1 or (float(value) >= 1 and float(value).is_integer())


@dataclass(frozen=True)
class RewardModelConfig:
    """Settings of ``train_reward_model``. Values out of range raise ValueError.

    Defaults are those of published work: one epoch, since a second one overfits (Ouyang et al.
    2022, appendix C.2), of batches of some dozen pairs at 1e-5, decaying to 0.
    """

    num_epochs: int = whole(1)
    """Passes over the pairs."""
    batch_size: int = whole(16)
    """Pairs of an optimizer step."""
    microbatch_tokens: int = whole(16_384)
    """Max tokens of one forward and backward pass, with padding; at least one pair. It bounds the
    memory and changes results by rounding alone."""
    learning_rate: float = number(1e-5, above=0)
    """Highest AdamW step size. 1e-5 for all weights, 1e-4 or more for LoRA and for small models."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up: "constant", or to 0 by "linear" or "cosine",
    as transformers' get_scheduler has them."""
    lr_warmup: float = allowed(0, _is_warmup, "a share in [0, 1) or a whole number of steps")
    """Optimizer steps in which the learning rate rises from 0; below 1: that share of all."""
    weight_decay: float = number(0.0, at_least=0)
    """AdamW weight decay; biases and the weights of norms have none."""
    max_grad_norm: float | None = number(1.0, above=0, or_none=True)
    """Gradients of a larger norm are scaled down to it; None: no limit."""
    use_margin: bool = False
    """Subtract the pairs' column "margin" from the difference of rewards (Touvron et al. 2023,
    equation 2)."""
    centering: float = number(0.0, at_least=0)
    """Weight of the mean of (r_chosen + r_rejected)^2, which keeps rewards around 0 (Eisenstein et
    al. 2023); 0.01 is usual."""
    max_length: int = whole(1024)
    """Max tokens of a prompt with its completion; of longer ones the prompt's beginning is cut."""
    format: Literal["joined", "pair", "chat", "policy"] | None = None
    """How texts become tokens; see ClassifierReward. None: "policy" for a ppo_fast.RewardModel,
    which a trainer gives the policy's tokens; else what the model's config says; else "chat" for
    pairs of chats, if the tokenizer has a chat template; else "joined". "policy" ends each text
    with EOS: if the policy's max_length cuts most responses, take "joined"."""
    lora_rank: int | None = whole(None, or_none=True)
    """Train LoRA adapters of this rank and the head, and merge them at the end; None: the weights
    themselves."""
    num_layers_unfrozen: int | None = whole(None, or_none=True)
    """Number of top layers that are trained, with the head; embeddings and lower layers, the trunk,
    stay as they are. None: all."""
    early_stopping_patience: int | None = whole(None, or_none=True)
    """Evaluations in a row without a lower held-out loss after which training ends; the weights of
    the best evaluation are then restored. None: all epochs, and the last weights."""
    eval_steps: int | None = whole(None, or_none=True)
    """Optimizer steps between evaluations of the held-out pairs; None: after each epoch."""
    compute_dtype: Literal["bfloat16"] | None = None
    """Compute in bfloat16 by autocast, with trained weights in float32; None: all in float32."""
    seed: int = whole(0, at_least=0)
    """Seed of the new head, of new adapters, of the split and of the order of pairs."""

    def __post_init__(self) -> None:
        check_fields(self)
