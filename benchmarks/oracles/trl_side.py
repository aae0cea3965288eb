"""Losses and advantages of TRL's GRPO and RLOO trainers, called on stubs with tiny tensors."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from functools import cache
from types import CodeType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.trainer import grpo_trainer, rloo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

# One process: what it gathers and reduces is its own.
ACCELERATOR = SimpleNamespace(
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    pad_across_processes=lambda x, **_: x,
    reduce=lambda x, **_: x,
    num_processes=1,
    process_index=0,
    sync_gradients=True,
)


def grpo(
    *, loss_type: str = "dapo", level: str = "token", clip: tuple[float, float], **settings: Any
) -> Any:
    """Return a stub of a GRPOTrainer that computes losses; ``settings`` are its attributes."""
    arguments = {
        "use_bias_correction_kl": False,
        "delta": settings.pop("delta", None),
        "steps_per_generation": 1,
        "entropy_target": settings.pop("entropy_target", 0.0),
        "entropy_coef_delta": settings.pop("entropy_coef_delta", 0.005),
        "entropy_coef_min": 0.0,
        "entropy_coef_max": 1e6,
    }
    attributes = {
        "accelerator": ACCELERATOR,
        "args": SimpleNamespace(**arguments),
        "model": SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "beta": 0.0,
        "current_gradient_accumulation_steps": 1,
        "entropy_coef": 0.0,
        "epsilon_low": clip[0],
        "epsilon_high": clip[1],
        "importance_sampling_level": level,
        "loss_type": loss_type,
        "max_completion_length": 32,
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "use_adaptive_entropy": False,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "_entropy_bonus_enabled": False,
        "_entropy_window_stats": None,
        "_metrics": {"train": defaultdict(list)},
    }
    stub = SimpleNamespace(**attributes | settings)
    stub.get_high_entropy_mask = MethodType(GRPOTrainer.get_high_entropy_mask, stub)
    return stub


def grpo_loss(
    stub: Any, logprobs: Tensor, entropy: Tensor, mask: Tensor, **inputs: Tensor
) -> Tensor:
    """Return the loss of log-probs and entropies [B, T] that a model would have given."""
    _give(stub, logprobs, entropy)
    inputs["num_items_in_batch"] = inputs.get("num_items_in_batch", mask.sum())
    return GRPOTrainer._compute_loss(stub, None, _completions(mask) | inputs)


def rloo_loss(
    logprobs: Tensor, mask: Tensor, clip: tuple[float, float], **inputs: Tensor
) -> Tensor:
    """Return the loss of log-probs [B, T] that a model would have given."""
    stub = SimpleNamespace(
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        epsilon_low=clip[0],
        epsilon_high=clip[1],
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    _give(stub, logprobs, torch.zeros_like(logprobs))
    return RLOOTrainer._compute_loss(stub, None, _completions(mask) | inputs)


def _give(stub: Any, logprobs: Tensor, entropy: Tensor) -> None:
    stub._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, entropy, None)


def _completions(mask: Tensor) -> dict[str, Any]:
    ones = torch.ones(mask.shape, dtype=torch.int64)
    prompts = {"prompt_ids": ones[:, :1], "prompt_mask": ones[:, :1]}
    return prompts | {"completion_ids": ones, "completion_mask": mask}


def grpo_advantages(scores: Tensor, samples_per_prompt: int, scale_rewards: str) -> Tensor:
    """Return GRPOTrainer's advantages [B] of scores [B]."""
    return _advantages(
        grpo_trainer,
        GRPOTrainer,
        scores,
        samples_per_prompt,
        {},
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards=scale_rewards,
    )


def rloo_advantages(
    scores: Tensor,
    samples_per_prompt: int,
    *,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    beta: float = 0.0,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """Return RLOOTrainer's advantages [B] of scores [B], less the KL of each sequence."""
    names = {
        "old_per_token_logps": logprobs,
        "ref_per_token_logps": ref_logprobs,
        "completion_mask": mask,
        "gather": lambda x: x,
    }
    return _advantages(
        rloo_trainer,
        RLOOTrainer,
        scores,
        samples_per_prompt,
        names,
        beta=beta,
        normalize_advantages=False,
        reward_clip_range=clip,
    )


def importance_weights(
    mode: str, logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, bounds: tuple
) -> Tensor:
    """Return GRPOTrainer's weights [B, T] or [B, 1] of what vLLM sampled."""
    stub = SimpleNamespace(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=bounds[0],
        vllm_importance_sampling_clip_max=bounds[1],
    )
    scope = {
        **vars(grpo_trainer),
        "self": stub,
        "old_per_token_logps": logprobs,
        "sampling_per_token_logps": sampling_logprobs,
        "completion_mask": mask,
        "tool_mask": None,
    }
    ends = "mask = completion_mask if tool_mask", "if self.vllm_importance_sampling_mode in"
    exec(_statements(GRPOTrainer, *ends), scope)
    return scope["vllm_importance_sampling_ratio"]


def _advantages(
    module: Any, trainer: type, scores: Tensor, samples: int, names: dict[str, Any], **settings: Any
) -> Tensor:
    """Run a trainer's statements from its rewards to its advantages."""
    scope = {
        **vars(module),
        **names,
        "self": SimpleNamespace(reward_weights=torch.ones(1, dtype=scores.dtype), **settings),
        "rewards_per_func": scores[:, None].clone(),
        "num_generations": samples,
        "device": scores.device,
    }
    exec(_statements(trainer, "unscorable_mask = ", "advantages = torch.nan_to_num"), scope)
    return scope["advantages"]


@cache
def _statements(trainer: type, first: str, last: str) -> CodeType:
    """Compile the statements amid the generation of completions that begin and end so."""
    source = inspect.getsource(inspect.unwrap(trainer._generate_and_score_completions))
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        body = getattr(node, "body", [])
        lines = [ast.unparse(statement) for statement in body] if isinstance(body, list) else []
        begin = [index for index, line in enumerate(lines) if line.startswith(first)]
        if begin:
            end = [index for index, line in enumerate(lines) if line.startswith(last)]
            return compile("\n".join(lines[begin[0] : end[-1] + 1]), trainer.__name__, "exec")
    raise ValueError(f"{trainer.__name__} has no statement that begins with {first!r}")
