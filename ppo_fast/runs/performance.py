"""Performance of steps: tokens and operations a second, and memory."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

import torch

from ppo_fast.config import PPOConfig
from ppo_fast.critics.critic import Critic
from ppo_fast.data.rollout import Rollout
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.runs.flops import Sizes, sizes_of, step_flops

# Dense bfloat16 products with float32 sums, TFLOP/s, by the name that the driver gives. From
# NVIDIA's data sheets (A100, H100, H200, B200, L4, L40S, A10; half of what they give with sparsity)
# and its white papers on the GA102, Ada and RTX Blackwell architectures (GeForce).
PEAKS = (
    (r"A100\b", 312.0),
    (r"H100 PCIe", 756.0),
    (r"H100 NVL", 835.0),
    (r"H100\b", 989.0),
    (r"H200 NVL", 835.0),
    (r"H200\b", 989.0),
    (r"B200\b", 2250.0),
    (r"L4$", 121.0),
    (r"L40S$", 362.0),
    (r"A10$", 125.0),
    (r"GeForce RTX 3090$", 71.0),
    (r"GeForce RTX 4090$", 165.2),
    (r"GeForce RTX 5090$", 209.5),
)


class Performance:
    """Measures the steps of a trainer, without waiting for the device.

    Args:
        policy: the policy.
        critic: its value model, if it has one, counts.
        config: number of epochs and others.
    """

    def __init__(self, policy: LanguageModel, critic: Critic, config: PPOConfig) -> None:
        self._policy, self._critic, self._config = policy, critic, config
        self._sizes: tuple[Sizes, Sizes | None] | None = None

    def begin_step(self) -> None:
        """Begin to measure a step: forget the peak memory of the steps before."""
        if self._policy.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._policy.device)

    def metrics(
        self,
        rollout: Rollout,
        metrics: Mapping[str, float],
        *,
        policy_epochs: int | None = None,
        value_epochs: int | None = None,
        old_computed: bool = False,
    ) -> dict[str, float]:
        """Return the metrics of a step that has ended.

        Args:
            rollout: its responses; batches that were sampled again do not count.
            metrics: those of the step, with the seconds of its parts.
            policy_epochs, value_epochs: passes of the update; None: the config's.
            old_computed: whether old log-probs were computed anew before the update.

        Returns:
            perf/tokens_per_second: tokens of prompts and responses, by the seconds of the step.
            perf/response_tokens_per_second: tokens of responses, by those of the rollout.
            perf/tflops: 10**12 operations a second; ``step_flops`` has the formula.
            perf/mfu: that, as a share of the GPU's peak in bfloat16, where this is known.
            perf/peak_memory_gb: ``peak_memory_gb``, where it is known.
        """
        seconds = sum(metrics[f"time/{part}"] for part in ("rollout", "experience", "update"))
        tokens = rollout.tokens
        passes = self._config.num_epochs if policy_epochs is None else policy_epochs
        of_value = value_epochs or self._config.value_epochs or passes
        if "policy_optimizer_steps" in metrics:  # target_kl ended the epochs before
            minibatches = min(self._config.num_minibatches, len(tokens))
            passes_done = metrics["policy_optimizer_steps"] / minibatches
        else:
            passes_done = float(passes)
        policy, value = self._both_sizes()
        flops = step_flops(
            tokens,
            policy,
            value,
            top=_top(self._policy),
            value_top=_top(self._critic),
            samples_per_prompt=rollout.samples_per_prompt,
            policy_epochs=passes_done,
            value_epochs=of_value,
            old_computed=old_computed,
            value_of_prompts=not getattr(self._critic, "per_token", True),
            policy_packed=self._policy.packed,
            value_packed=self._critic.packed,
        )
        found = {
            "perf/tokens_per_second": float(tokens.lengths.sum()) / seconds,
            "perf/response_tokens_per_second": float(tokens.response_lengths.sum())
            / metrics["time/rollout"],
            "perf/tflops": flops / seconds / 1e12,
        }
        peak = peak_tflops(self._policy.device)
        if peak is not None:
            found["perf/mfu"] = found["perf/tflops"] / peak
        memory = peak_memory_gb(self._policy.device)
        if memory is not None:
            found["perf/peak_memory_gb"] = memory
        return found

    def _both_sizes(self) -> tuple[Sizes, Sizes | None]:
        """Return the sizes of the policy and of a value model of its own, read once."""
        if self._sizes is None:
            own = self._critic.trained and not self._critic.reads_states
            value = sizes_of(self._critic.module) if own else None
            self._sizes = sizes_of(self._policy.model), value
        return self._sizes


def _top(owner: LanguageModel | Critic) -> int | None:
    """Return the number of layers above the trunk; None without one."""
    split = getattr(getattr(owner, "passes", None), "split", None)
    return None if split is None else split.num_layers_unfrozen


def peak_tflops(device: torch.device) -> float | None:
    """Return the peak of a GPU in dense bfloat16 products, 10**12 a second; None: unknown."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Return the peak of a GPU by the name that the driver gives; None: unknown."""
    if "MIG" in name:  # a part of a GPU
        return None
    return next((peak for words, peak in PEAKS if re.search(rf"(^| ){words}", name)), None)


def peak_memory_gb(device: torch.device) -> float | None:
    """Return the most memory in use, in 10**9 bytes; None: unknown.

    On a GPU that of PyTorch's tensors since the peak was reset, on a CPU that of the process since
    its start.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type != "cpu":
        return None
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
