"""PPOConfig: every number of the algorithm, with what its default rests on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

import torch

from ppo_fast.data.sampling import Sampling
from ppo_fast.ops.linear_logprobs.api import LOGITS_BUDGET_BYTES

Critic = Literal["model", "head", "top", "baseline"]


@dataclass(frozen=True)
class PPOConfig:
    """Settings of a PPO run. ``PPOConfig()`` has what the field found to work for language models;
    ``PPOConfig.spec()`` has the numbers and forms of the classic trainer interface that a bare
    ``PPOTrainer(...)`` uses. Values out of range raise ValueError.
    """

    learning_rate: float = 1e-5
    """AdamW step size of the policy. 1e-6 to 1e-5 for all weights of a model of 1B parameters and
    up, 1e-5 to 1e-4 for the top layers of a small one."""
    value_learning_rate: float | None = None
    """AdamW step size of the value function; None: the policy's."""
    clip_epsilon: float = 0.2
    """Ratios are clipped to [1 - clip_epsilon, 1 + clip_epsilon] (Schulman et al. 2017)."""
    clip_epsilon_high: float | None = None
    """Upper clip range where it differs from the lower one ("clip-higher"); None: the same."""
    dual_clip: float | None = None
    """For negative advantages, the bound c > 1 on how much a token can cost (Ye et al. 2020)."""
    value_clip: float | None = 0.2
    """New values stay within this of the old ones; None: not clipped."""
    kl_penalty: float = 0.05
    """Coefficient of the KL to the reference. The same number holds the policy far more firmly in
    the reward than in the loss, since advantages are whitened: 0.4 against 41 nats in one toy."""
    kl_in: Literal["reward", "loss"] = "reward"
    """"reward": subtracted from each token's reward (InstructGPT; unbiased). "loss": a term of the
    loss (biased low in practice, never delays the score)."""
    kl_estimator: Literal["k1", "abs", "k2", "k3", "k1+k2"] | None = None
    """Per-token KL estimate; None: k1 in the reward, k1+k2 (k1's value, k2's gradient) in the
    loss."""
    gamma: float = 1.0
    """Discount a token. 1: a response's score counts in full for its first token."""
    gae_lambda: float = 0.95
    """GAE's lambda: 1 has no bias, lower trusts the value function more. critic="baseline" has no
    value of later states to trust and uses 1."""
    value_loss_coef: float = 0.5
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus. Language models start with ample entropy: 0."""
    max_grad_norm: float = 1.0
    """Gradients of the policy and of the value function are each clipped to this norm."""
    num_epochs: int = 4
    """Passes over each batch of experience."""
    num_minibatches: int = 1
    """Optimizer steps an epoch. One was found best by the TL;DR reproduction studies."""
    microbatch_tokens: int = 16384
    """Most tokens (padding included) in one forward-backward pass. Bounds memory, of which logits
    take 4 bytes times the vocabulary a response token, a few times over; the result does not
    depend on it."""
    forward_batch_tokens: int = 32768
    """The same for passes without gradients."""
    whiten_advantages: bool = True
    """Advantages of a batch to mean 0, variance 1 over its valid tokens."""
    aggregation: Literal["token-mean", "seq-mean-token-mean"] = "token-mean"
    """"token-mean": every token of a batch counts the same; "seq-mean-token-mean": every
    response does."""
    critic: Critic | None = None
    """Who estimates values: "model" (the value_model), "head" (a linear head on the policy's last
    hidden state), "top" (top layers of its own above the policy's frozen trunk; with
    num_layers_unfrozen), "baseline" (the mean of the other sequences of the batch, no value
    function). None: "model" when a value_model is given, else "baseline"."""
    num_layers_unfrozen: int | None = None
    """Train only this many top layers (with the final norm and an untied LM head); the layers
    below are one frozen trunk, its activations computed once a step. None: train everything."""
    trunk_dtype: Literal["bfloat16"] | None = None
    """What the trunk's activations are kept as from the rollout to the last epoch: 2 bytes a number
    instead of 4. Old log-probs then are computed from them too. (Activations outgrow float16.)
    None: as the model computes."""
    compute_dtype: Literal["bfloat16"] | None = None
    """What the models compute in. "bfloat16": trained weights are float32 all the same (autocast;
    responses are drawn with copies in bfloat16), frozen ones stay as they are stored. None: float32
    throughout."""
    trained_weights: Literal["float32", "stochastic", "kahan"] = "float32"
    """How trained weights are held. In float32; or, with compute_dtype, in bfloat16, to which each
    step's sum is rounded up or down by chance ("stochastic") or with its rounding error kept for
    the next one ("kahan"): plain rounding would lose most steps of RL's size."""
    gradient_checkpointing: bool = False
    """Keep a layer's input alone, and no logits, and compute the rest again in the backward
    pass."""
    adamw: Literal["fused", "foreach"] = "fused"
    """torch's implementation of AdamW. "fused" reads and writes everything once, and needs no
    temporaries; "foreach" is for devices that it does not know."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging of gradients and of their squares: its usual numbers."""
    adam_eps: float = 1e-5
    """1e-5, as in the original PPO code, keeps rarely touched weights from large steps."""
    weight_decay: float = 0.0
    """AdamW's. The KL to the reference, not a pull to zero, is what holds the policy: 0."""
    max_length: int = 150
    """Most tokens a response."""
    temperature: float = 1.0
    """Divides logits when sampling and in every log-prob."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: from all. Truncation biases the update: see
    sampling_logprobs."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this much probability; 1: from all."""
    min_new_tokens: int = 0
    """A response's first tokens, this many, are drawn among those that end nothing."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a response, beside the tokenizer's EOS and the model's."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response; the token that completes one belongs to it."""
    rollout_slots: int | None = None
    """Sequences decoded at a time: where one ends, the next prompt takes its place. Bounds the KV
    cache; None: the whole batch."""
    cuda_graphs: bool = True
    """On a GPU, capture decoding steps and replay them: a small model's take less than launching
    their kernels one by one. Off by itself, with a warning, where that changes a token."""
    kept_rollout_bytes: int = 2**32
    """With cuda_graphs on a GPU: a rollout's buffers (KV cache) and its copies of weights in
    compute_dtype are each kept for the next one where they take at most this many bytes, so that
    its graphs need not be captured again, which takes 30 to 60 ms for each batch size. 0: both are
    freed before the update."""
    seed: int = 0
    """Seed of everything random: prompt order, minibatches, and, with a sequence's number and a
    token's position, each draw."""

    def __post_init__(self) -> None:
        for name in ("max_grad_norm", "clip_epsilon", "dual_clip", "gamma", "gae_lambda", "top_p"):
            value = getattr(self, name)
            ok = isinstance(value, Real) or (name == "dual_clip" and value is None)
            self._check(name, ok, "a number")
        for name in ("learning_rate", "temperature", "adam_eps"):
            self._check(name, self._finite(name) and getattr(self, name) > 0, "a number above 0")
        for name in ("kl_penalty", "value_loss_coef", "weight_decay"):
            self._check(name, self._finite(name) and getattr(self, name) >= 0, "a number >= 0")
        self._check("entropy_coef", self._finite("entropy_coef"), "a finite number")
        # inf switches gradient clipping off
        self._check("max_grad_norm", self.max_grad_norm > 0, "a number above 0 (inf: no clipping)")
        for name in ("value_learning_rate", "clip_epsilon_high", "value_clip"):
            ok = getattr(self, name) is None or (self._finite(name) and getattr(self, name) > 0)
            self._check(name, ok, "a number above 0, or None")
        self._check("clip_epsilon", 0 < self.clip_epsilon < 1, "a number in (0, 1)")
        self._check("dual_clip", self.dual_clip is None or self.dual_clip > 1, "above 1, or None")
        for name in ("gamma", "gae_lambda"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        self._check("top_p", 0 < self.top_p <= 1, "a number in (0, 1]")
        counts = ("num_epochs", "num_minibatches", "microbatch_tokens", "forward_batch_tokens")
        for name in (*counts, "max_length"):
            self._check(name, self._whole(name) and getattr(self, name) >= 1, "a whole number >= 1")
        name = "kept_rollout_bytes"
        self._check(name, self._whole(name) and getattr(self, name) >= 0, "a whole number >= 0")
        self._check("top_k", self._whole("top_k") and self.top_k >= 0, "a whole number >= 0")
        self._check("seed", self._whole("seed") and 0 <= self.seed < 2**31, "in [0, 2**31)")
        for name in ("stop_token_ids", "stop_strings"):  # a config file has lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self.sampling()  # which checks what it is made of
        slots = self.rollout_slots
        ok = slots is None or (self._whole("rollout_slots") and slots >= 1)
        self._check("rollout_slots", ok, "a whole number >= 1, or None")
        k = self.num_layers_unfrozen
        ok = k is None or (self._whole("num_layers_unfrozen") and k >= 1)
        self._check("num_layers_unfrozen", ok, "a whole number >= 1, or None")
        betas = self.adam_betas
        ok = isinstance(betas, (tuple, list)) and len(betas) == 2
        ok = ok and all(isinstance(b, Real) and 0 <= b < 1 for b in betas)
        self._check("adam_betas", ok, "two numbers in [0, 1)")
        self._check_choice("whiten_advantages", (True, False))
        self._check_choice("cuda_graphs", (True, False))
        self._check_choice("kl_in", ("reward", "loss"))
        self._check_choice("kl_estimator", (None, "k1", "abs", "k2", "k3", "k1+k2"))
        self._check_choice("aggregation", ("token-mean", "seq-mean-token-mean"))
        self._check_choice("critic", (None, "model", "head", "top", "baseline"))
        self._check_choice("trunk_dtype", (None, "bfloat16"))
        self._check_choice("compute_dtype", (None, "bfloat16"))
        self._check_choice("trained_weights", ("float32", "stochastic", "kahan"))
        self._check_choice("gradient_checkpointing", (True, False))
        self._check_choice("adamw", ("fused", "foreach"))
        if self.critic == "top" and self.num_layers_unfrozen is None:
            raise ValueError(
                "critic='top' is trained above a frozen trunk: set num_layers_unfrozen, or use "
                "critic='model' with a value_model"
            )
        if self.trained_weights != "float32" and self.compute_dtype is None:
            raise ValueError(
                f"trained_weights={self.trained_weights!r} holds them in bfloat16: set "
                "compute_dtype='bfloat16', or use trained_weights='float32'"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                'kl_estimator="k1" with kl_in="loss": the expected gradient of k1 is zero; '
                'use "k1+k2" (the same value, k2\'s gradient) or kl_in="reward"'
            )

    @classmethod
    def spec(cls) -> PPOConfig:
        """The numbers and forms of the classic interface: gamma 0.99, KL 0.1 in the loss, values
        not clipped, AdamW's usual epsilon."""
        return cls(gamma=0.99, kl_penalty=0.1, kl_in="loss", value_clip=None, adam_eps=1e-8)

    @property
    def clip(self) -> tuple[float, float]:
        """(low, high) clip ranges."""
        return self.clip_epsilon, self.clip_epsilon_high or self.clip_epsilon

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """compute_dtype, as torch has it."""
        return None if self.compute_dtype is None else getattr(torch, self.compute_dtype)

    @property
    def logits_budget_bytes(self) -> int:
        """What linear_logprobs may keep for its backward pass."""
        return 0 if self.gradient_checkpointing else LOGITS_BUDGET_BYTES

    @property
    def weights_dtype(self) -> torch.dtype:
        """What trained weights are held in."""
        return torch.float32 if self.trained_weights == "float32" else torch.bfloat16

    def sampling(self, max_length: int | None = None, temperature: float | None = None) -> Sampling:
        """How responses are drawn; an argument comes before the setting of its name."""
        return Sampling(
            max_length=self.max_length if max_length is None else max_length,
            temperature=self.temperature if temperature is None else temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_new_tokens=self.min_new_tokens,
            stop_token_ids=self.stop_token_ids,
            stop_strings=self.stop_strings,
        )

    def estimator(self) -> Literal["k1", "abs", "k2", "k3", "k1+k2"]:
        """The KL estimator, with None resolved by ``kl_in``."""
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k1+k2")

    def _check(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    def _check_choice(self, name: str, choices: tuple[object, ...]) -> None:
        self._check(name, getattr(self, name) in choices, f"one of {choices}")

    def _finite(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, Real) and math.isfinite(value)

    def _whole(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, Integral) and not isinstance(value, bool)
