"""Reading a causal language model: states, log-probs and decoding steps.

Two paths give the same numbers. The fused path takes hidden states from the body and computes
log-probs with ``linear_logprobs``, at response positions only. The ordinary path takes logits from
the model. A comparison of both at construction finds heads that compute something else than
``hidden @ weight.T`` (scaled, wrapped, hooked); their models take the ordinary path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.models.checks import check_kv_cache_dtype
from ppo_fast.models.offload import Resting
from ppo_fast.models.parts import body_of
from ppo_fast.models.passes import Flat, Passes
from ppo_fast.models.patching import uncompiled
from ppo_fast.models.precision import (
    HALF,
    HALF_TOLERANCE,
    autocast_dtype,
    computing_in,
    tolerance,
)
from ppo_fast.models.probe import Probed, probe, probe_tokens, relative_difference
from ppo_fast.models.transformers_internals import (
    attention_of,
    cache_argument,
    logit_scale,
    output_of,
    softcap,
)
from ppo_fast.models.trunk import Split, run
from ppo_fast.nonfinite import NotFiniteError, first_not_finite
from ppo_fast.ops import (
    QuantizedRows,
    TokenLogprobs,
    few_row_linear,
    linear_logprobs,
    logprobs_from_logits,
)
from ppo_fast.ops.gradient import computed_in
from ppo_fast.ops.linear_logprobs.api import LOGITS_BUDGET_BYTES

# Largest relative difference between decoding and one pass over all tokens: models held in float64
# compute some parts, such as rotary tables, in float32.
DECODING_TOLERANCE_FLOAT64 = 1e-6


class Forward(NamedTuple):
    """Output of one pass over Tokens.

    states: [B, T, D], the state before each response token; None where the model's body cannot be
        told from its head.
    logits: [B, T, V], on the ordinary path only.
    """

    states: Tensor | None
    logits: Tensor | None


class Next(NamedTuple):
    """Output that the next token of n sequences is drawn from.

    logits: [n, V], float64 where the model is, else float32.
    states: [n, D], from which the logits were computed; None on the ordinary path.
    """

    logits: Tensor
    states: Tensor | None


class LanguageModel:
    """A transformers causal language model, read at response positions.

    Args:
        model: the model. It is not changed.
        num_layers_unfrozen: number of layers above the trunk. ``compute_trunk_states`` computes the
            trunk states, and ``forward`` can start from them. None: there is no trunk.
        compute_dtype: autocast dtype of its products; None: the dtype of its weights.
        logits_budget_bytes: as linear_logprobs': logits kept for the backward pass.
        padding_free: whether passes over whole sequences may be packed (passes.py).
        kv_cache_dtype: dtype in which decoding stores keys and values; None: the dtype that it
            computes in.

    Attributes:
        passes: its passes over whole sequences.
        vocab_size: number of its logits.
        own_autocast: dtype of the autocast that the model's own forward enters, as that of a model
            which accelerate has prepared does; None: it enters none.
        fused: whether log-probs are computed from hidden states and the LM head.
        reason: why (not).
        resting: those of its weights that rest in host memory; None: none do.
        int8_head: a copy of the LM head's weight in int8, which ``next`` computes with during some
            rollouts; None: it computes with the weight.
        fused_differs: whether the fused path is not taken because its logits would differ.

    Raises:
        ValueError: ``num_layers_unfrozen`` is not below the number of layers, or the model cannot
            be split there; or ``kv_cache_dtype`` is not for models of this dtype on this device.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_layers_unfrozen: int | None = None,
        compute_dtype: torch.dtype | None = None,
        logits_budget_bytes: int = LOGITS_BUDGET_BYTES,
        padding_free: bool = True,
        kv_cache_dtype: torch.dtype | None = None,
    ) -> None:
        check_kv_cache_dtype(kv_cache_dtype, model, compute_dtype)
        self.model, self.compute_dtype, self.kv_cache_dtype = model, compute_dtype, kv_cache_dtype
        self.logits_budget_bytes, self.padding_free = logits_budget_bytes, padding_free
        body = body_of(model)
        self.body: nn.Module | None = None if body is model else body
        self.head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
        config: Any = model.config
        self.text_config: Any = config.get_text_config()
        self.logit_scale, self.softcap = logit_scale(self.text_config), softcap(self.text_config)
        self._cache_argument = cache_argument(model)
        k = num_layers_unfrozen
        self.split = None if k is None else Split(self.body, k)
        self.fused_differs = False
        self.resting: Resting | None = None
        self.int8_head: QuantizedRows | None = None
        with computing_in(compute_dtype, self.device):
            probed = probe(model)
        self.own_autocast, self.vocab_size = probed.autocast, probed.logits.shape[-1]
        reason = self._fused_fails(probed)
        self.fused = reason is None
        self.reason = reason or "the body's states times the LM head equal the model's logits"
        with computing_in(compute_dtype, self.device), uncompiled(model):
            self.passes = Passes(
                self.body if self.fused and self.body is not None else model,
                self.split,
                padding_free=padding_free and self.body is not None,
                tolerance=self.tolerance,
            )
        if self.split is not None and (reason := self._split_fails()):
            raise ValueError(
                f"num_layers_unfrozen: {type(model).__name__} cannot be split into a trunk and a "
                f"top ({reason}); use num_layers_unfrozen=None"
            )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def resident(self) -> AbstractContextManager[None]:
        """Within the block, all of its weights are on their device."""
        return nullcontext() if self.resting is None else self.resting.resident()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def tolerance(self) -> float:
        """The largest relative difference between two of its passes that rounding explains."""
        half = self.compute_dtype or self.own_autocast or autocast_dtype(self.device.type)
        return tolerance(half or self.dtype, self.device)

    @property
    def decoding_tolerance(self) -> float:
        """``tolerance`` between decoding with a cache and one pass over all tokens."""
        return max(self.tolerance, DECODING_TOLERANCE_FLOAT64)

    @property
    def cache_tolerance(self) -> float:
        """``decoding_tolerance`` with keys and values in ``kv_cache_dtype``."""
        return HALF_TOLERANCE if self.kv_cache_dtype in HALF else self.decoding_tolerance

    @property
    def states_size(self) -> int:
        """D, the size of the states; OPT's may be narrower than its layers."""
        return self._head_weights()[0].shape[1] if self.fused else self.text_config.hidden_size

    @property
    def packed(self) -> bool:
        """Whether its passes over whole sequences have no padding."""
        return self.passes.packed

    def forward(self, tokens: Tokens, trunk_states: TrunkStates | None = None) -> Forward:
        """Run one pass over prompts and responses, from the tokens or from their trunk states.

        A model without a trunk ignores trunk states. Gradients flow where the caller enabled them.
        """
        states, logits = self._run(tokens, trunk_states)
        return Forward(
            None if states is None else states.before_response(tokens),
            None if logits is None else logits.before_response(tokens),
        )

    def logprobs(
        self, forward: Forward, tokens: Tokens, *, temperature: float, entropy: bool = False
    ) -> TokenLogprobs:
        """Compute log-probs (and entropies) [B, T] of the response tokens, 0 beyond a response."""
        labels, mask = tokens.response_ids, tokens.response_mask
        if forward.logits is not None:
            return logprobs_from_logits(
                forward.logits, labels, mask=mask, temperature=temperature, entropy=entropy
            )
        assert forward.states is not None
        weight, bias = self._head_weights()
        states = forward.states
        if self.compute_dtype is not None:  # autocast does not reach the op
            states, weight = states.to(self.compute_dtype), weight.to(self.compute_dtype)
        return linear_logprobs(
            states,
            weight,
            labels,
            bias=bias,
            mask=mask,
            temperature=temperature,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            entropy=entropy,
            logits_budget_bytes=self.logits_budget_bytes,
        )

    def shares_head_with(self, other: LanguageModel) -> bool:
        """Return whether one product with the LM head gives both models' logits."""
        return self.fused and other.fused and _same(self._head_weights(), other._head_weights())

    @torch.no_grad()
    def compute_trunk_states(self, tokens: Tokens) -> TrunkStates:
        """Compute the trunk states, the inputs of the first unfrozen layer."""
        with computing_in(self.compute_dtype, tokens.device):
            return self.passes.compute_trunk_states(tokens)

    def recording_trunk(self) -> AbstractContextManager[list[Tensor]]:
        """Within the block, append the trunk states [B, n, D] of every pass to the yielded list.

        Decoding computes the trunk states of every token but the last anyway. Without a trunk the
        list stays empty.
        """
        return nullcontext([]) if self.split is None else self.split.recording()

    @torch.no_grad()
    def next(
        self, at: tuple[Tensor, Tensor] | None = None, *, cache: Any, **arguments: Any
    ) -> Next:
        """Run one pass with a cache, and return logits and states of the next tokens.

        Args:
            at: rows [n] and columns [n] of the tokens to continue. None: the last column of every
                row. The ordinary path gives the last column whatever ``at`` is.
            cache: the KV cache.
            arguments: the model's other arguments.
        """
        arguments[self._cache_argument] = cache
        if not self.fused:
            output = output_of(self.model, **arguments, use_cache=True, logits_to_keep=1)
            logits = output.logits[:, -1]
            return Next(logits.to(computed_in(logits.dtype)), None)
        assert self.body is not None
        states = output_of(self.body, **arguments, use_cache=True).last_hidden_state
        states = states[:, -1] if at is None else states[at]
        return Next(self._shape(self._products(states)), states)

    def _products(self, states: Tensor) -> Tensor:
        """Compute logits [n, V] from states [n, D], in float32 for half precision too.

        Rounded to bfloat16, a logit of 20 would put a probability 6% off.
        """
        weight, bias = self._head_weights()
        if self.int8_head is not None:
            numbers, scale = self.int8_head
            products = few_row_linear(states.float(), numbers, scale=scale)
            return products if bias is None else products + bias
        if states.dtype not in HALF and weight.dtype not in HALF:
            return few_row_linear(states, weight, bias)
        if states.is_cuda:
            products = torch.mm(states, weight.T, out_dtype=torch.float32)
        else:
            products = few_row_linear(states.float(), weight)
        return products if bias is None else products + bias

    def _shape(self, logits: Tensor) -> Tensor:
        logits = logits * self.logit_scale if self.logit_scale != 1.0 else logits
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def _head_weights(self) -> tuple[Tensor, Tensor | None]:
        assert isinstance(self.head, nn.Linear)
        return self.head.weight, self.head.bias

    def _run(
        self, tokens: Tokens, trunk_states: TrunkStates | None, *, last: bool = False
    ) -> tuple[Flat | None, Flat | None]:
        """Return states and, on the ordinary path, logits; of last tokens if asked for."""
        with computing_in(self.compute_dtype, tokens.device):
            if self.fused:
                return self.passes.states(tokens, trunk_states, last=last), None
            if self.body is None:
                return None, self.passes.logits(self.model, tokens, last=last)
            with _output_of(self.body) as output, uncompiled(self.model, around=self.body):
                logits = self.passes.logits(self.model, tokens, trunk_states, last=last)
            states = output[0].last_hidden_state
            return Flat(states.flatten(0, 1), logits.places), logits

    @torch.no_grad()
    def _fused_fails(self, probed: Probed) -> str | None:
        """Return the reason why the fused path cannot be used; None if its logits are the
        model's."""
        if self.body is None:
            return f"{type(self.model).__name__} has no base_model"
        # subclasses may compute something else, as 4-bit layers and LoRA's do
        if type(self.head) is not nn.Linear:
            return f"the LM head is a {type(self.head).__name__}, not a torch.nn.Linear"
        if self.head._forward_hooks or self.head._forward_pre_hooks:
            return "the LM head has hooks"
        with computing_in(self.compute_dtype, self.device):
            states = getattr(run(self.body, probed.tokens), "last_hidden_state", None)
            if states is None:
                self.body = None  # a wrapper's base_model is the whole model
                return f"the base_model of {type(self.model).__name__} returns no last_hidden_state"
            weight, bias = self._head_weights()
            if states.shape[-1] != weight.shape[1]:
                return f"the states have {states.shape[-1]} numbers, the LM head {weight.shape[1]}"
            found = self._shape(nn.functional.linear(states, weight, bias).float())
        real, expected = probed.tokens.attention_mask.bool(), probed.logits.float()
        if found[real].isnan().any() or expected[real].isnan().any():
            raise nan_error(self)
        difference = relative_difference(found[real], expected[real])
        if not difference <= tolerance(self.compute_dtype or self.head.weight.dtype, self.device):
            self.fused_differs = True
            return f"the body's states times the LM head differ from the logits by {difference:.1e}"
        return None

    @torch.no_grad()
    def _split_fails(self) -> str | None:
        """Return the reason why the model cannot start from trunk states, or None if it can.

        It can if its last states are then the same.
        """
        tokens = probe_tokens(self.model)
        try:
            assert self.split is not None
            with computing_in(self.compute_dtype, self.device):
                padded = self.split.compute_trunk_states(tokens)
            if (shape := padded.shape)[:2] != tokens.input_ids.shape:
                return (
                    f"its layers take states {list(shape)} for tokens {[*tokens.input_ids.shape]}"
                )
            trunk_states = TrunkStates.pack(padded, tokens, whole=True)
            runs = [self._run(tokens, given, last=True)[0] for given in (None, trunk_states)]
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            return f"{type(error).__name__}: {error}"
        whole, split = (found.padded() for found in runs if found is not None)
        real = tokens.attention_mask.bool()
        if whole[real].isnan().any() or split[real].isnan().any():
            raise nan_error(self)
        difference = relative_difference(split[real], whole[real])
        return None if difference <= self.tolerance else f"its states differ by {difference:.1e}"


def nan_error(model: LanguageModel) -> NotFiniteError:
    """Return the error to raise where a few tokens gave NaN."""
    if (name := first_not_finite(dict(model.model.named_parameters()))) is not None:
        return NotFiniteError(f"policy_model: its weight {name} holds NaN or infinite numbers")
    own = attention_of(model.text_config)
    other = "sdpa" if own == "eager" else "eager"
    float16 = ", or float16 overflowed" if model.dtype == torch.float16 else ""
    return NotFiniteError(
        f"policy_model: attention gave NaN for a few tokens of {type(model.model).__name__}, whose "
        f"weights are finite{float16} (attn_implementation={own!r}, {model.dtype} on "
        f"{model.device}); load it with attn_implementation={other!r}"
    )


def _same(tensors: Iterable[Tensor | None], others: Iterable[Tensor | None]) -> bool:
    return all(a is b for a, b in zip(tensors, others, strict=True))


@contextmanager
def _output_of(module: nn.Module) -> Iterator[list[Any]]:
    """Within the block, append what ``module`` returns to the yielded list."""
    output: list[Any] = []
    handle = module.register_forward_hook(lambda _, __, result: output.append(result))
    try:
        yield output
    finally:
        handle.remove()
