"""PPOConfig: every setting of the algorithm, with the reason for its default."""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

from ppo_fast.checks import allowed, check_fields, number, whole, with_names_checked
from ppo_fast.data.sampling import Sampling


def _are_betas(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2
    return pair and all(isinstance(beta, Real) and 0 <= float(beta) < 1 for beta in value)


class _ClassDoc:
    """Docstring of a dataclass with a line for each field: its type, default and own docstring.

    The fields' docstrings, which are the strings below them, are read from the source when somebody
    asks for the class's.
    """

    def __init__(self, cls: type) -> None:
        self.cls, self.summary = cls, inspect.cleandoc(cls.__doc__ or "")

    def __get__(self, instance: object, owner: type) -> str:
        return self.text

    @cached_property
    def text(self) -> str:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(self.cls)))
        except (OSError, TypeError):  # installed without sources
            return self.summary
        defaults = {item.name: item.default for item in fields(self.cls)}
        entries = []
        for item, after in pairwise(tree.body[0].body):  # type: ignore[attr-defined]
            if isinstance(item, ast.AnnAssign):
                name, kind = ast.unparse(item.target), ast.unparse(item.annotation)
                words = " ".join(ast.literal_eval(after.value).split())
                entries.append(f"{name} ({kind}, default {defaults[name]!r}): {words}")
        wrapped = textwrap.TextWrapper(
            96, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False
        )
        return "\n".join([self.summary, "", "Args:", *map(wrapped.fill, entries)])


Critic = Literal["model", "head", "top", "baseline"]


@dataclass(frozen=True)
class PPOConfig:
    """Settings of a PPO run. Values out of range raise ValueError.

    ``PPOConfig()`` has defaults that published work found good for language models.
    ``PPOConfig.spec()`` has the numbers and forms of the classic trainer interface, which a bare
    ``PPOTrainer(...)`` uses.
    """

    learning_rate: float = number(1e-5, above=0)
    """AdamW step size of the policy. 1e-6 to 1e-5 for all weights of a model of 1B parameters and
    up, 1e-5 to 1e-4 for the top layers of a small one."""
    value_learning_rate: float | None = number(None, above=0, or_none=True)
    """AdamW step size of the value function; None: the policy's."""
    clip_epsilon: float = number(0.2, above=0, below=1)
    """Ratios are clipped to [1 - clip_epsilon, 1 + clip_epsilon] (Schulman et al. 2017)."""
    clip_epsilon_high: float | None = number(None, above=0, or_none=True)
    """Upper clip range where it differs from the lower one ("clip-higher"); None: the same."""
    dual_clip: float | None = number(None, above=1, or_none=True)
    """For negative advantages, ratios above this count as this (Ye et al. 2020); None: no bound."""
    value_clip: float | None = number(0.2, above=0, or_none=True)
    """In the value loss, new values are clipped to the old ones ± this; None: not clipped."""
    kl_penalty: float = number(0.05, at_least=0)
    """Coefficient of the KL to the reference. The same number limits the KL far more in the reward
    than in the loss, since advantages are whitened: in one toy run the KL was 0.4 nats with
    kl_in="reward" and 41 with kl_in="loss"."""
    kl_in: Literal["reward", "loss"] = "reward"
    """"reward": subtracted from each token's reward (InstructGPT; unbiased). "loss": a term of the
    loss (biased low in practice; the returns are of the score alone)."""
    kl_estimator: Literal["k1", "abs", "k2", "k3", "k1+k2"] | None = None
    """KL estimate per token; None: k1 in the reward, k1+k2 (k1's value, k2's gradient) in the
    loss."""
    gamma: float = number(1.0, at_least=0, at_most=1)
    """Discount per token. 1: a response's score counts in full for its first token."""
    gae_lambda: float = number(0.95, at_least=0, at_most=1)
    """GAE's lambda: 1 has no bias, lower trusts the value function more. critic="baseline" does
    not estimate values of later states, and uses 1."""
    value_loss_coef: float = number(0.5, at_least=0)
    """Weight of the value loss."""
    entropy_coef: float = number(0.0)
    """Weight of the entropy bonus. 0, since language models start with enough entropy."""
    max_grad_norm: float = number(1.0, above=0, or_inf="no clipping")
    """Gradients of the policy and of the value function are each clipped to this norm."""
    num_epochs: int = whole(4)
    """Passes over each batch of experience."""
    num_minibatches: int = whole(1)
    """Optimizer steps per epoch. The TL;DR reproduction studies found one to be best."""
    microbatch_tokens: int = whole(16384)
    """Max tokens (padding included) in one forward-backward pass. Bounds memory: the logits
    of one response token take a few times 4 bytes times the vocabulary size. The result does not
    depend on it."""
    forward_batch_tokens: int = whole(32768)
    """Max tokens (padding included) in one pass without gradients."""
    whiten_advantages: bool = True
    """Scale a batch's advantages to mean 0, variance 1 over its valid tokens."""
    aggregation: Literal["token-mean", "seq-mean-token-mean"] = "token-mean"
    """"token-mean": every token of a batch counts the same; "seq-mean-token-mean": every
    response does."""
    critic: Critic | None = None
    """Critic, which estimates values: "model" (the value_model), "head" (a linear head on the
    policy's last hidden state), "top" (top layers of its own above the policy's frozen trunk; with
    num_layers_unfrozen), "baseline" (the mean of the other sequences of the batch, no value
    function). None: "model" when a value_model is given, else "baseline"."""
    num_layers_unfrozen: int | None = whole(None, or_none=True)
    """Train only this many top layers (with the final norm and an untied LM head); the layers
    below are one frozen trunk, its activations computed once per step. None: train everything."""
    trunk_dtype: Literal["bfloat16"] | None = None
    """Storage dtype of the trunk's activations from the rollout to the last epoch. "bfloat16" takes
    2 bytes per number instead of 4; old log-probs are then computed from the rounded activations
    too. (Activations exceed float16's range.) None: the dtype that the model computes in."""
    compute_dtype: Literal["bfloat16"] | None = None
    """Dtype that the models compute in. "bfloat16": trained weights are still float32 (autocast;
    responses are drawn with copies in bfloat16) unless trained_weights says otherwise, and frozen
    ones stay as they are stored. None: float32 throughout."""
    trained_weights: Literal["float32", "stochastic", "kahan"] = "float32"
    """How trained weights are stored: in float32 ("float32"), or in bfloat16, which needs
    compute_dtype. In bfloat16 each updated weight is rounded up or down at random ("stochastic"),
    or its rounding error is added at the next step ("kahan"): plain rounding would lose most
    updates at the learning rates of RL."""
    gradient_checkpointing: bool = False
    """Store only each layer's input, and no logits; the backward pass recomputes the rest."""
    adamw: Literal["fused", "foreach"] = "fused"
    """torch's implementation of AdamW. "fused" reads and writes everything once, and needs no
    temporary tensors; "foreach" is for devices that "fused" does not support."""
    adam_betas: tuple[float, float] = allowed((0.9, 0.999), _are_betas, "two numbers in [0, 1)")
    """AdamW's decay rates for the running means of gradients and of their squares; the usual
    numbers."""
    adam_eps: float = number(1e-5, above=0)
    """AdamW's epsilon. 1e-5, as in the original PPO code, prevents large steps of weights that
    rarely have a gradient."""
    weight_decay: float = number(0.0, at_least=0)
    """AdamW's weight decay. 0: the KL term keeps the policy near the reference; nothing has to
    pull weights to zero."""
    max_length: int = 150
    """Max tokens of a response."""
    temperature: float = 1.0
    """The logits are divided by it, when sampling and in every log-prob."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: from all. Truncation biases the update: see
    sampling_logprobs."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this much probability; 1: from all."""
    min_new_tokens: int = 0
    """Min tokens of a response: until then, tokens that would end it are not drawn."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a response, in addition to the EOS of the tokenizer and of the model."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response; the token that completes one is the response's last token."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the completions that rewards and logs get. False keeps those such
    as <think>, and leaves out only the EOS token at the end."""
    rollout_slots: int | None = whole(None, or_none=True)
    """Number of sequences decoded at a time: when one ends, the next prompt takes its slot. Bounds
    the KV cache; None: the whole batch."""
    cuda_graphs: bool = True
    """On a GPU, capture decoding steps and replay them: a small model's kernels take less time than
    launching them one by one. Switched off, with a warning, where replaying changes a token."""
    kept_rollout_bytes: int = whole(2**32, at_least=0)
    """With cuda_graphs on a GPU: a rollout's buffers (KV cache) and its copies of weights in
    compute_dtype are each kept for the next rollout if they take at most this many bytes. Kept
    buffers save capturing the graphs again for each batch size. 0: both are freed before the
    update."""
    seed: int = whole(0, at_least=0, below=2**31)
    """Seed of the prompt order, of the minibatches and, together with the sequence's number and the
    token's position, of each sampled token."""

    def __post_init__(self) -> None:
        check_fields(self)
        self.sampling()  # Sampling checks its own fields
        if self.critic == "top" and self.num_layers_unfrozen is None:
            raise ValueError(
                "critic='top' is trained above a frozen trunk: set num_layers_unfrozen, or use "
                "critic='model' with a value_model"
            )
        if self.trained_weights != "float32" and self.compute_dtype is None:
            raise ValueError(
                f"trained_weights={self.trained_weights!r} stores weights in bfloat16: set "
                "compute_dtype='bfloat16', or use trained_weights='float32'"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                'kl_estimator="k1" with kl_in="loss": the expected gradient of k1 is zero; '
                'use "k1+k2" (the same value, k2\'s gradient) or kl_in="reward"'
            )

    @classmethod
    def spec(cls) -> PPOConfig:
        """Return the numbers and forms of the classic interface.

        These are gamma 0.99, KL 0.1 in the loss, values not clipped, AdamW's usual epsilon.
        """
        return cls(gamma=0.99, kl_penalty=0.1, kl_in="loss", value_clip=None, adam_eps=1e-8)

    @property
    def clip(self) -> tuple[float, float]:
        """Clip ranges (low, high)."""
        return self.clip_epsilon, self.clip_epsilon_high or self.clip_epsilon

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """``compute_dtype`` as a torch dtype, or None."""
        import torch  # here, so that the command line's --help can do without

        return None if self.compute_dtype is None else getattr(torch, self.compute_dtype)

    @property
    def weights_dtype(self) -> torch.dtype:
        """Storage dtype of trained weights."""
        import torch

        return torch.float32 if self.trained_weights == "float32" else torch.bfloat16

    def sampling(self, max_length: int | None = None, temperature: float | None = None) -> Sampling:
        """Return how responses are drawn; an argument overrides the setting of its name."""
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
        """Return the KL estimator; where it is None, the one that ``kl_in`` implies."""
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k1+k2")


PPOConfig.__init__ = with_names_checked(PPOConfig.__init__)  # type: ignore[method-assign]
PPOConfig.__doc__ = _ClassDoc(PPOConfig)  # type: ignore[assignment]


def warn_of_discount(gamma: float, max_length: int) -> bool:
    """Warn if the score of a long response hardly counts for its first token; say if it warned."""
    weight = gamma**max_length
    if weight >= 0.5:
        return False
    warnings.warn(
        f"gamma: {gamma} over {max_length} tokens leaves {weight:.2f} of the score at a "
        "response's first token; gamma=1 counts it in full",
        stacklevel=4,
    )
    return True
