"""Passes over whole sequences: without padding where the model's attention can be told of it.

A packed pass has the tokens of all sequences in one row, and a prompt that several share once. So
no linear layer sees padding, or a prompt twice. Its states are those of a padded pass, but for
rounding. A model qualifies by a comparison of both when it is taken: its attention comes from
transformers' AttentionInterface, and nothing else in it looks at other tokens.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.models.heads import RewardModel, ValueModel
from ppo_fast.models.packed_attention import PackedPass, checkpoint_contexts
from ppo_fast.models.parts import body_of, num_embeddings
from ppo_fast.models.patching import is_compiled, uncompiled
from ppo_fast.models.precision import computing_in, computing_in_float32, tolerance
from ppo_fast.models.probe import relative_difference
from ppo_fast.models.trunk import Split, run

SWITCHED_OFF = "padding_free=False"

# Prompts and responses on which a packed pass is compared: prompts that are shared, of different
# lengths, and responses of different lengths.
PROBE = (((5, 9, 13), (3, 7)), ((5, 9, 13), (8, 2, 4)), ((6, 1), (11,)), ((5, 9, 13), (10,)))


class Flat(NamedTuple):
    """A pass's states or logits, one entry a token.

    numbers: [n, ...], of the tokens as they were computed.
    places: [B, L] int64, where those of each sequence stand; beyond its end, some other token's.
        [B, L - 1] of a pass without last tokens.
    """

    numbers: Tensor
    places: Tensor

    def before_response(self, tokens: Tokens) -> Tensor:
        """Select those of the tokens before each response token: [B, T, ...].

        Beyond a response they are some other token's.
        """
        return take(self.numbers, tokens.before_response(self.places))

    def last(self, tokens: Tokens) -> Tensor:
        """Select those of each sequence's last token: [B, ...]."""
        index = self.places.gather(1, (tokens.lengths - 1).to(self.places.device)[:, None])
        return take(self.numbers, index[:, 0])

    def padded(self) -> Tensor:
        """Select those of all tokens: [B, L, ...]."""
        return take(self.numbers, self.places)


def take(numbers: Tensor, index: Tensor) -> Tensor:
    """Return numbers[index], of the first dimension.

    Its backward pass sums the gradients of a token that several rows read. On a GPU, that of
    index_select would sum them in any order.
    """
    if not numbers.is_cpu:
        return numbers[index]
    return numbers.index_select(0, index.flatten()).unflatten(0, index.shape)


class Passes:
    """Runs a body, or a model around it, over whole sequences.

    Args:
        module: the body or model.
        split: its trunk and top; None: there is no trunk, and trunk states are ignored.
        padding_free: whether passes may be packed.
        tolerance: largest relative difference of states that rounding explains.

    Attributes:
        why_padded: the reason why its passes have padding; None: they are packed.
    """

    def __init__(
        self, module: nn.Module, split: Split | None, *, padding_free: bool, tolerance: float
    ) -> None:
        self.module, self.split = module, split
        config: Any = module.config
        self._config: Any = config.get_text_config()
        self.why_padded = self._why_padded(tolerance) if padding_free else SWITCHED_OFF

    @property
    def packed(self) -> bool:
        """Whether passes are packed now: a model may have been compiled meanwhile."""
        return self.why_padded is None and why_not_now(self.module) is None

    def logits(
        self,
        model: nn.Module,
        tokens: Tokens,
        trunk_states: TrunkStates | None = None,
        *,
        last: bool = False,
    ) -> Flat:
        """Compute the logits of ``model``, whose body this is.

        Those after each sequence's last token are among them if ``last`` asks for them.
        """
        return self._run(model, tokens, trunk_states, "logits", last=last)

    def states(
        self, tokens: Tokens, trunk_states: TrunkStates | None = None, *, last: bool = False
    ) -> Flat:
        """Compute the body's last states; those of last tokens if ``last`` asks for them."""
        return self._run(self.module, tokens, trunk_states, "last_hidden_state", last=last)

    def _run(
        self,
        module: nn.Module,
        tokens: Tokens,
        trunk_states: TrunkStates | None,
        name: str,
        *,
        last: bool,
    ) -> Flat:
        tokens = tokens if last else tokens.without_last
        packed = self._packed_pass(tokens)
        trunk_states = None if self.split is None else trunk_states
        output = run(module, tokens, self.split, trunk_states, packed=packed)
        return flat(getattr(output, name), tokens, packed=packed is not None)

    def compute_trunk_states(self, tokens: Tokens) -> TrunkStates:
        """Compute the trunk states, those of last tokens too."""
        assert self.split is not None
        packed = self._packed_pass(tokens)
        states = self.split.compute_trunk_states(tokens, packed=packed)
        if packed is not None:
            return TrunkStates.of(states[0], tokens, whole=True)
        return TrunkStates.pack(states, tokens, whole=True)

    def _packed_pass(self, tokens: Tokens) -> PackedPass | None:
        return PackedPass(tokens, self._config) if self.packed else None

    @torch.no_grad()
    def _why_padded(self, tolerance: float) -> str | None:
        if (reason := why_not_now(self.module)) is not None:
            return reason
        tokens = probe_packed_tokens(self.module)
        packed_pass = PackedPass(tokens, self._config)
        try:
            whole, packed = self._both(packed_pass)
            difference = relative_difference(packed, whole)
            fits = difference <= tolerance or self._are_rounded(whole, packed, packed_pass)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            return f"{type(error).__name__}: {error}"
        layers = self._config.num_hidden_layers
        if len(packed_pass.used) != layers:
            return (
                f"{len(packed_pass.used)} of {layers} layers call attention through "
                "AttentionInterface"
            )
        return None if fits else f"packed states differ by {difference:.1e}"

    def _both(self, packed_pass: PackedPass) -> tuple[Tensor, Tensor]:
        """Return the numbers of all tokens [N, ...], of a padded and of the packed pass."""
        tokens = packed_pass.tokens
        whole = _numbers(run(self.module, tokens))
        found = _numbers(run(self.module, tokens, packed=packed_pass))
        real = tokens.attention_mask.bool()
        return whole[real], flat(found, tokens, packed=True).padded()[real]

    def _are_rounded(self, whole: Tensor, packed: Tensor, packed_pass: PackedPass) -> bool:
        """Return whether rounding to half precision explains how far the numbers are apart.

        Of many layers it adds up beyond any tolerance. It does explain it if both passes agree in
        float32, and the packed one is at most twice as far from that as the padded one.
        """
        try:
            with computing_in_float32(self.module):
                exact, exact_packed = self._both(packed_pass)
        except RuntimeError:  # as of a model that is too large
            return False
        if not relative_difference(exact_packed, exact) <= tolerance(torch.float32, exact.device):
            return False
        return bool((packed - exact).norm() <= 2 * (whole - exact).norm())


def passes_of(
    body: Any, split: Split | None, *, compute_dtype: torch.dtype | None, padding_free: bool
) -> Passes:
    """Return the passes of a body that computes in ``compute_dtype``, as LanguageModel's."""
    weight = next(body.parameters())
    with computing_in(compute_dtype, weight.device), uncompiled(body):
        limit = tolerance(compute_dtype or weight.dtype, weight.device)
        return Passes(body, split, padding_free=padding_free, tolerance=limit)


def head_passes(
    module: nn.Module,
    split: Split | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    padding_free: bool = True,
) -> Passes | None:
    """Return the passes of the body in a ValueModel or RewardModel; None: it is another module.

    Its states are read by ``module.read``. One whose forward was changed or has hooks is called.
    """
    if type(module) not in (RewardModel, ValueModel) or "forward" in vars(module):
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    base_model: Any = module.base_model
    body: Any = body_of(base_model)
    if not hasattr(body, "config"):
        return None
    return passes_of(body, split, compute_dtype=compute_dtype, padding_free=padding_free)


def flat(numbers: Tensor, tokens: Tokens, *, packed: bool) -> Flat:
    """Return what a pass gave for each token, [1, N, ...] if it was packed, else [B, L, ...]."""
    count = numbers.shape[0] * numbers.shape[1]
    index = (
        tokens.packed_index
        if packed
        else torch.arange(count, device=numbers.device).view(numbers.shape[:2])
    )
    return Flat(numbers.flatten(0, 1), index)


def why_not_now(module: nn.Module) -> str | None:
    """Return the reason why passes of a module cannot be packed as it is now, or None."""
    if "torch._dynamo" in sys.modules and any(map(is_compiled, module.modules())):
        return "it is compiled"
    for part in module.modules():
        if getattr(part, "gradient_checkpointing", False) and part.training:
            function = getattr(part, "_gradient_checkpointing_func", None)
            given = getattr(function, "keywords", {}).get("context_fn")
            if given is not checkpoint_contexts:
                return "its gradient checkpointing was not enabled by PPOConfig"
    return None


def probe_packed_tokens(model: Any) -> Tokens:
    """Return the tokens of ``PROBE`` in the model's vocabulary."""
    vocabulary = num_embeddings(model)
    prompts, responses = ([[i % vocabulary for i in row[k]] for row in PROBE] for k in (0, 1))
    return make_tokens(prompts, responses, 0, next(model.parameters()).device)


def _numbers(output: Any) -> Tensor:
    states = getattr(output, "last_hidden_state", None)
    return output.logits if states is None else states
