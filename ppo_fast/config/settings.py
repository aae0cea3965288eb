"""PPOConfig: every setting of the algorithm, with the reason for its default."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

from ppo_fast.checks import (
    allowed,
    check_fields,
    number,
    tuple_of,
    whole,
    with_names_checked,
)
from ppo_fast.config.class_doc import ClassDoc
from ppo_fast.config.recipes import GRPO, RLOO, SAO
from ppo_fast.config.together import check_together
from ppo_fast.config.trl import settings_from_trl
from ppo_fast.data.sampling import Sampling


def _are_betas(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2
    return pair and all(isinstance(beta, Real) and 0 <= float(beta) < 1 for beta in value)


def _is_range(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2
    return pair and all(isinstance(end, Real) for end in value) and 0 <= value[0] < value[1]


def _are_weights(value: Any) -> bool:
    numbers = isinstance(value, tuple) and all(isinstance(x, Real) for x in value)
    return numbers and all(math.isfinite(x) for x in value)


def _rests(value: Any) -> bool:
    names = {"optimizer", "reference", "reward"}
    return isinstance(value, tuple) and all(isinstance(x, str) and x in names for x in value)


def _is_warmup(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return 0 <= float(value) < 1 or (float(value) >= 1 and float(value).is_integer())


Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum"]
Importance = Literal["truncate", "mask", "sequence-truncate", "sequence-mask"]
Critic = Literal["model", "head", "top", "baseline", "group_mean", "group_norm", "batch_mean"]


@dataclass(frozen=True)
class PPOConfig:
    """Settings of a PPO run. Values out of range raise ValueError.

    ``PPOConfig()`` has defaults that published work found good for language models.
    ``PPOConfig.spec()`` has the numbers and forms of the classic trainer interface, which a bare
    ``PPOTrainer(...)`` uses.
    """

    learning_rate: float = number(1e-5, above=0, at_most=1)
    """AdamW step size of the policy. 1e-6 to 1e-5 for all weights of a model of 1B parameters and
    up, 1e-5 to 1e-4 for the top layers of a small one."""
    value_learning_rate: float | None = number(None, above=0, at_most=1, or_none=True)
    """AdamW step size of the value function; None: the policy's."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of both learning rates after the warm-up, over the run's optimizer steps: "constant",
    "linear" (to 0) or "cosine" (to lr_floor), as transformers' get_scheduler has them."""
    lr_warmup: float = allowed(0, _is_warmup, "a share in [0, 1) or a whole number of steps")
    """Optimizer steps in which the learning rates rise from 0; below 1: that share of the run's."""
    lr_floor: float = number(0.0, at_least=0, below=1)
    """Last learning rate of the "cosine" schedule, as a share of the highest."""
    schedule_steps: int | None = whole(None, or_none=True)
    """Steps of PPO at which the schedules of learning rates and of the KL coefficient end. None:
    the last step of train()."""
    clip_epsilon: float = number(0.2, above=0, below=1)
    """Ratios are clipped to [1 - clip_epsilon, 1 + clip_epsilon] (Schulman et al. 2017)."""
    clip_epsilon_high: float | None = number(None, above=0, or_none=True)
    """Upper clip range where it differs from the lower one ("clip-higher"); None: the same."""
    dual_clip: float | None = number(None, above=1, or_none=True)
    """For negative advantages, ratios above this count as this (Ye et al. 2020); None: no bound."""
    objective: Literal["clip", "cispo", "mask"] = "clip"
    """"clip": PPO's; "cispo": the clipped ratio is a constant weight of the log-prob (MiniMax-M1,
    arXiv 2506.13585); "mask": tokens whose ratio is outside the clip range are left out, whatever
    the sign of their advantage (SAO, arXiv 2607.07508)."""
    ratio: Literal["token", "sequence", "sequence-product"] = "token"
    """Ratio that is clipped: each token's, the geometric mean of a sequence's (GSPO, Zheng et al.
    2025), or their product, the ratio of whole sequences."""
    ratio_to: Literal["old", "sampler"] = "old"
    """Denominator of the ratio: the policy before the update, as the trainer computes it, or the
    distribution that tokens were drawn from (truncated sampling, another engine)."""
    importance: Importance | None = None
    """Weights of tokens, for what the sampler's distribution differs from the policy's: ratios of
    the two, cut to importance_range ("truncate", Yao et al. 2025), or 0 outside of it ("mask",
    IcePop), or 0 for sequences whose geometric mean is outside ("sequence-mask"), or each
    sequence's product of ratios, cut ("sequence-truncate"). None: no weights; with rollout_weights,
    "truncate"."""
    importance_range: tuple[float, float] = allowed((0.0, 2.0), _is_range, "0 <= low < high")
    """Range of the ratios that importance cuts to or leaves standing."""
    value_clip: float | None = number(0.2, above=0, or_none=True)
    """In the value loss, new values are clipped to the old ones ± this; None: not clipped."""
    value_huber: float | None = number(None, above=0, or_none=True)
    """In the value loss, errors above this count linearly (Huber 1964); None: squared."""
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
    kl_controller: Literal["fixed", "adaptive", "linear"] = "fixed"
    """Course of the KL coefficient, from kl_penalty: "fixed"; "adaptive", towards kl_target
    (Ziegler et al. 2019, section 2.2); "linear", to kl_penalty_end over the schedule's steps."""
    kl_target: float | None = number(None, above=0, or_none=True)
    """KL of a sequence, in nats, that the adaptive controller aims at."""
    kl_horizon: int = whole(10_000)
    """Sequences in which the adaptive controller changes the coefficient by about 20% at most."""
    kl_penalty_end: float | None = number(None, at_least=0, or_none=True)
    """Last KL coefficient of the "linear" controller."""
    gamma: float = number(1.0, at_least=0, at_most=1)
    """Discount per token. 1: a response's score counts in full for its first token."""
    gae_lambda: float = number(0.95, at_least=0, at_most=1)
    """GAE's lambda: 1 has no bias, lower trusts the value function more. critic="baseline" does
    not estimate values of later states, and uses 1."""
    gae_lambda_value: float | None = number(None, at_least=0, at_most=1, or_none=True)
    """Lambda of the value function's targets (VC-PPO, Yuan et al. 2025, has 1); None: the same."""
    gae_length_alpha: float | None = number(None, above=0, or_none=True)
    """Lambda of the advantages by length: 1 - 1 / (alpha * response tokens), at least 0 (VAPO, Yue
    et al. 2025, eq. 7, has 0.05); None: gae_lambda."""
    value_loss_coef: float = number(0.5, at_least=0)
    """Weight of the value loss."""
    entropy_coef: float = number(0.0)
    """Weight of the entropy bonus. 0, since language models start with enough entropy."""
    entropy_bonus_share: float = number(1.0, above=0, at_most=1)
    """Share of a batch's tokens, those of highest entropy, that get the bonus."""
    entropy_target: float | None = number(None, above=0, or_none=True)
    """Entropy of a token, in nats, below which the bonus grows: each step adds entropy_coef_step to
    its weight, or takes it away above the target, where there is no bonus (Skywork-OR1, He et al.
    2025). None: the weight is fixed."""
    entropy_coef_step: float = number(0.005, above=0)
    """Change of the bonus's weight a step, with entropy_target."""
    loss_token_share: float = number(1.0, above=0, at_most=1)
    """Share of a batch's tokens, those of highest entropy, that the policy loss trains (Wang et al.
    2025, "Beyond the 80/20 rule", has 0.2)."""
    max_grad_norm: float = number(1.0, above=0, or_inf="no clipping")
    """Gradients of the policy and of the value function are each clipped to this norm."""
    num_epochs: int = whole(4)
    """Passes over each batch of experience."""
    value_epochs: int | None = whole(None, or_none=True)
    """Passes of the value function over each batch; None: num_epochs."""
    target_kl: float | None = number(None, above=0, or_none=True)
    """KL of a token to the policy before the update, in nats, beyond which the policy is not
    trained in the step's remaining epochs; None: it always is."""
    critic_warmup_steps: int = whole(0, at_least=0)
    """First steps, in which the value function alone is trained."""
    num_minibatches: int = whole(1)
    """Optimizer steps per epoch. The TL;DR reproduction studies found one to be best."""
    microbatch_tokens: int = whole(16384)
    """Max tokens in one forward-backward pass, with padding where it has any. Bounds memory: the
    logits of one response token take a few times 4 bytes times the vocabulary size. The result does
    not depend on it."""
    forward_batch_tokens: int = whole(32768)
    """Max tokens in one pass without gradients, with padding where it has any."""
    padding_free: bool = True
    """Run passes over whole sequences without padding, and over a prompt once for all its samples,
    where a model's attention can be told of it; others are padded. The result differs by rounding
    alone."""
    whiten_advantages: bool = True
    """Scale a batch's advantages to mean 0, variance 1 over its valid tokens."""
    aggregation: Aggregation = "token-mean"
    """"token-mean": every token of a batch counts the same; "seq-mean-token-mean": every response
    does; "seq-mean-token-sum": the sum over tokens, divided by sequences times max_length (Dr.
    GRPO); "token-sum": the sum."""
    critic: Critic | None = None
    """Critic, which estimates values: "model" (the value_model), "head" (a linear head on the
    policy's last hidden state), "top" (top layers of its own above the policy's frozen trunk; with
    num_layers_unfrozen), or no value function: "baseline" (mean of the others: of the prompt's
    samples, or of the batch where samples_per_prompt is 1; RLOO), "group_mean" (mean of the
    prompt's samples; Dr. GRPO), "group_norm" (advantages are also divided by their standard
    deviation; GRPO), "batch_mean" (REINFORCE++). None: "model" when a value_model is given, else
    "baseline"."""
    num_layers_unfrozen: int | None = whole(None, or_none=True)
    """Train only this many top layers (with the final norm and an untied LM head); the layers
    below are one frozen trunk, its activations computed once per step. None: train everything."""
    frozen: tuple[str, ...] = tuple_of((), str, 'patterns, ("*.self_attn.*",)')
    """Patterns of names of the policy's weights that are not trained, as fnmatch reads them. A
    "top" critic shares these weights."""
    value_frozen: tuple[str, ...] = tuple_of((), str, 'patterns, ("*.self_attn.*",)')
    """The same for a value function of its own ("model", "top")."""
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
    adam_eps: float = number(1e-5, at_least=1e-20, at_most=1)
    """AdamW's epsilon. 1e-5, as in the original PPO code, prevents large steps of weights that
    rarely have a gradient."""
    weight_decay: float = number(0.0, at_least=0, at_most=1)
    """AdamW's weight decay, of all weights but biases and those of norms. 0: the KL term keeps the
    policy near the reference; nothing has to pull weights to zero."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Where a loss, gradient, value or score is NaN or infinite, the run stops with an error that
    says where, or goes on without that optimizer step (of a value or score: with new prompts)."""
    max_skipped: int = whole(4, at_least=0)
    """Most optimizer steps, or batches of prompts, in a row that "skip" leaves out."""
    check_gradients_together: bool = True
    """Compute the gradients of policy and value function before an optimizer step changes either,
    so that neither moves where one is not finite. False: a value model's gradients take no memory
    beside the policy's, and the policy has moved when they are not finite."""
    offload: tuple[Literal["optimizer", "reference", "reward"], ...] = allowed(
        (), _rests, 'a list of "optimizer", "reference" and "reward"'
    )
    """Keep these in host memory while a GPU does other work: the optimizers' moments, which come in
    pieces for each step, and the weights of the reference and of reward models, which come for
    their passes. Saves their memory and costs the copies; on the CPU nothing moves."""
    undo_updates: bool = False
    """Keep a copy of trained weights and moments from before each update (12 bytes a weight, in
    host memory), and put it back where the update ends with a loss or gradient that is not finite,
    or with such outputs. False: optimizer steps before that stand; resume from a checkpoint."""
    samples_per_prompt: int = whole(1)
    """Responses to each prompt of a step; the prompt is computed once."""
    max_resampled_batches: int = whole(0, at_least=0)
    """Times that a step replaces prompts whose samples all got one score, by new prompts (DAPO, Yu
    et al. 2025, section 3.2); those left are kept."""
    reward_normalization: Literal["batch", "group", "running"] | None = None
    """Subtract the mean of the scores and divide by their standard deviation: of the batch, of the
    prompt's samples, or of all batches so far."""
    reward_weights: tuple[float, ...] = allowed(
        (), _are_weights, "a list of finite numbers, one for each reward"
    )
    """Weights of several rewards, in their order; none: 1 each."""
    reward_scale: float = number(1.0)
    """Factor of the scores (after normalisation)."""
    reward_clip: float | None = number(None, above=0, or_none=True)
    """Rewards are clipped to ± this, after all else; None: not clipped."""
    missing_eos_penalty: float = number(0.0, at_least=0)
    """Subtracted from the score of a response that was cut off at max_length."""
    overlong_buffer: int = whole(0, at_least=0)
    """Tokens before max_length in which the penalty of length grows from 0 to overlong_penalty
    (DAPO, Yu et al. 2025, eq. 13)."""
    overlong_penalty: float = number(1.0, at_least=0)
    """Largest penalty of length, with overlong_buffer."""
    mask_truncated: bool = False
    """Leave responses that were cut off at max_length out of the losses."""
    max_length: int = 150
    """Max tokens of a response."""
    max_prompt_length: int | None = whole(None, or_none=True)
    """Max tokens of a prompt; None: what the models' contexts leave beside max_length."""
    long_prompts: Literal["refuse", "cut", "drop"] = "refuse"
    """Prompts that are too long: an error before the first step; their beginning is cut; or train()
    drops them, and says how many."""
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
    kv_cache_dtype: Literal["bfloat16"] | None = None
    """Storage dtype of keys and values in rollouts on a CPU. "bfloat16" takes 2 bytes per number
    instead of 4, to be held and to be read at each step; tokens are then drawn from another
    distribution than the policy's, and old log-probs are computed anew. None: the dtype that steps
    compute in (on a CPU float32, with compute_dtype too). On a GPU it needs compute_dtype, and
    changes nothing."""
    rollout_weights: Literal["int8"] | None = None
    """Storage dtype of linear layers' weights in rollouts on the CPU, where few sequences take as
    long as the weights take to be read. "int8": copies of a byte a weight, with a scale for each
    output, are made for each rollout; the rest, and all of the update, stays in compute_dtype. What
    responses are drawn from then differs from the policy: old log-probs are computed once more, and
    importance corrects it. None: the policy's weights, or their copies in compute_dtype."""
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
        check_together(self)

    @classmethod
    def spec(cls) -> PPOConfig:
        """Return the numbers and forms of the classic interface.

        These are gamma 0.99, KL 0.1 in the loss, values not clipped, AdamW's usual epsilon.
        """
        return cls(gamma=0.99, kl_penalty=0.1, kl_in="loss", value_clip=None, adam_eps=1e-8)

    @classmethod
    def sao(cls, **settings: Any) -> PPOConfig:
        """Return Single-Rollout Asynchronous Optimization, in steps (arXiv 2607.07508).

        One response a prompt and a critic: 10 steps of warm-up, then two passes to the policy's
        one, with attention frozen in a value function of its own; its targets have lambda 1, the
        advantages lambda by length. The policy's ratio is to the sampler, and tokens outside of
        [0.2, 4] are left out. ``settings`` override.
        """
        own_layers = settings.get("critic") in (None, "model")
        return cls(**SAO | ({} if own_layers else {"value_frozen": ()}) | settings)

    @classmethod
    def rloo(cls, **settings: Any) -> PPOConfig:
        """Return REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740).

        Four responses a prompt, each score compared with the mean of the others'; one pass over
        them. The KL is in the rewards: a token's return has the KL from there on, and the scores
        that it is compared with have none. ``settings`` override.
        """
        return cls(**RLOO | settings)

    @classmethod
    def grpo(cls, **settings: Any) -> PPOConfig:
        """Return Group Relative Policy Optimization (Shao et al. 2024, arXiv 2402.03300).

        Eight responses a prompt, compared with their mean in units of their standard deviation; one
        pass over them; k3 of the KL in the loss, times 0.04; means over responses of their tokens'
        means. ``settings`` override.
        """
        return cls(**GRPO | settings)

    @classmethod
    def trl(cls, **arguments: Any) -> PPOConfig:
        """Return the settings of TRL's ``PPOConfig(**arguments)``, with TRL 1.12.0's defaults.

        Settings of ours that TRL has not, such as ``critic="head"``, may be among the arguments.

        Raises:
            TypeError, ValueError: an argument has no counterpart here; it says what to do.
        """
        return cls(**settings_from_trl(arguments, {item.name for item in fields(cls)}))

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
    def cache_dtype(self) -> torch.dtype | None:
        """``kv_cache_dtype`` as a torch dtype, or None."""
        import torch

        return None if self.kv_cache_dtype is None else getattr(torch, self.kv_cache_dtype)

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

    def importance_kind(self) -> Importance | None:
        """Return ``importance``; where it is None, the one that ``rollout_weights`` implies.

        Ratios to the sampler have its distribution in them already.
        """
        implied = self.rollout_weights is not None and self.ratio_to == "old"
        return self.importance or ("truncate" if implied else None)


PPOConfig.__init__ = with_names_checked(PPOConfig.__init__)  # type: ignore[method-assign]
PPOConfig.__doc__ = ClassDoc(PPOConfig)  # type: ignore[assignment]


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
